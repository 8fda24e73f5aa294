"""The largest batch that fits, by the memory that the compiler reports."""

import dataclasses

import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.teacher.batch_size import bytes_needed, fitting_batch_rows
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh, read_plan
from decant.schemas.signals import TargetSpec
from tests.making.caches import tiny_settings, write_teacher

ASKED = OutputSpec(TargetSpec(8))


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> PlannedTeacher:
    model = write_teacher(tmp_path_factory.mktemp("teacher"))
    return PlannedTeacher(str(model), "", "float32", 512, sequence_length=64, batch_rows=32)


def of_rows(planned: PlannedTeacher, rows: int) -> int:
    return bytes_needed(dataclasses.replace(planned, batch_rows=rows), ASKED)


def test_more_rows_need_more_and_weights_are_counted(planned):
    few, many = of_rows(planned, 1), of_rows(planned, 32)
    # The embedding, its transpose as head, and two blocks.
    weights = 4 * (2 * 512 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64))
    assert weights < few < many
    # The hidden states alone need this much more.
    assert many - few > 31 * 64 * 32 * 4
    coarse = dataclasses.replace(planned, quantize="int8", batch_rows=1)
    assert bytes_needed(coarse, ASKED) < few


def test_the_batch_is_halved_until_it_fits(planned):
    assert fitting_batch_rows(planned, ASKED) == 32
    for rows in (16, 4, 1):
        assert fitting_batch_rows(planned, ASKED, budget=of_rows(planned, rows)) == rows


def test_a_model_that_does_not_fit_at_all_is_refused_with_what_to_do(planned):
    with pytest.raises(
        ValueError, match=r"a batch of 1 rows .* needs .* on each device.*teacher.mesh.tensor"
    ):
        fitting_batch_rows(planned, ASKED, budget=of_rows(planned, 1) - 1)


def test_auto_is_a_number_in_the_plan_and_changes_no_id(tmp_path):
    config = tiny_settings(tmp_path)
    manifests = []
    for name, rows in (("auto", "auto"), ("unset", None)):
        teacher = dataclasses.replace(config.teacher, batch_rows=rows)
        manifests.append(
            precompute(dataclasses.replace(config, teacher=teacher, output=tmp_path / name))
        )
    plans = [read_plan(tmp_path / n / "parts/0000/plan.json") for n in ("auto", "unset")]
    assert plans[0].teacher == plans[1].teacher
    assert manifests[0].cache_id == manifests[1].cache_id
    # A plan of release 0.3 has `tensor_parallel` and no `quantize`.
    path = tmp_path / "unset/parts/0000/plan.json"
    old = read_json(path) | {"version": 1}
    old["teacher"] = {k: v for k, v in old["teacher"].items() if k not in ("mesh", "quantize")}
    write_json(path, old | {"teacher": old["teacher"] | {"tensor_parallel": 2}})
    assert read_plan(path).teacher.mesh == TeacherMesh(None, 2, 1)
