"""Hidden states and attention maps, captured and read by `Cache.read`."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint
from decant.pipelines.calibration.sample import sample_places
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.schemas import Cache, open_cache
from decant.schemas.manifest.plan import read_plan
from tests.making.caches import tiny_cache, tiny_settings

EVERY_LAYER = Hidden(layers=(0, 1, -1))
EVERY_MAP = Attention(layers="all", heads=(3, 0, 1), dtype="bfloat16")
HEADS = [3, 0, 1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, hidden=EVERY_LAYER, attention=EVERY_MAP)


@pytest.fixture(scope="module")
def narrow(root) -> Cache:
    """The same rows, stored with one byte a number."""
    return tiny_cache(
        root,
        hidden=Hidden(layers=(1, 2), dtype="int8"),
        attention=Attention(layers=(0, -1)),
        output=root / "narrow",
    )


@nnx.jit
def everything(model, tokens, segments, positions):
    _, hidden = model(tokens, segments, positions, hidden_layers=(0, 1, 2))
    maps = {
        block: model.attention_maps(hidden[block], segments, positions, layer=block)
        for block in (0, 1)
    }
    return hidden, maps


def of_documents(root: Path, batch: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """The teacher's states {layer: [n, S, D]} and maps {block: [n, heads, S, S]}.

    Each document is run alone; the results are placed where the document is in its row. All other
    positions are 0.
    """
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    n, length = batch["tokens"].shape
    hidden = {i: np.zeros((n, length, model.config.hidden_size)) for i in range(3)}
    maps = {i: np.zeros((n, model.config.num_heads, length, length)) for i in range(2)}
    for row in range(n):
        segments = batch["segment_ids"][row]
        for segment in set(segments[segments > 0]):
            at = np.flatnonzero(segments == segment)
            tokens, alone = np.zeros((2, 1, length), np.int32)
            tokens[0, : len(at)], alone[0, : len(at)] = batch["tokens"][row, at], 1
            states, of_block = everything(model, tokens, alone, np.arange(length)[None])
            for layer in hidden:
                hidden[layer][row, at] = states[layer][0, : len(at)]
            for block in maps:
                square = np.ix_(range(4), at, at)
                maps[block][row][square] = of_block[block][0, :, : len(at), : len(at)]
    return hidden, maps


def test_states_and_maps_are_those_of_each_document_alone(root, cache):
    rows = cache.rows()[[0, 7, 40, -1]]
    signals = ("hidden/0", "hidden/1", "hidden/2", "attention/0", "attention/1")
    batch = cache.read(rows, signals=signals)
    assert (np.diff(batch["segment_ids"], axis=1) > 0).any()  # a row with several documents
    assert (batch["segment_ids"] == 0).any()  # a row with padding
    hidden, maps = of_documents(root, batch)
    for layer, expected in hidden.items():
        stored = batch[f"hidden/{layer}"]
        assert stored.dtype == ml_dtypes.bfloat16
        # Half of bfloat16's last bit, plus the difference between two float32 programs.
        np.testing.assert_allclose(
            stored.astype(np.float64), expected, rtol=2**-8 * 1.01, atol=1e-5
        )
    for block, expected in maps.items():
        stored = batch[f"attention/{block}"]
        assert stored.dtype == ml_dtypes.bfloat16
        assert stored.shape == (4, 3, 64, 64)
        np.testing.assert_allclose(
            stored.astype(np.float64), expected[:, HEADS], rtol=2**-8 * 1.01, atol=1e-6
        )


def test_bfloat16_is_the_nearest_to_the_teachers_value(root, cache):
    """The teacher is run as in capture, so rounding is the only difference."""
    batch = cache.read(cache.rows()[:2], signals=("hidden/1",))
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    names = ("tokens", "segment_ids", "positions")
    _, chosen = model(*(batch[name] for name in names), hidden_layers=(1,))
    expected = np.asarray(chosen[1]).astype(ml_dtypes.bfloat16).astype(np.float32)
    counted = batch["segment_ids"] > 0
    stored = batch["hidden/1"].astype(np.float32)
    same = stored[counted] == expected[counted]
    assert same.mean() > 0.999  # the float32 of another program may round to the neighbour


def test_int8_states_are_within_a_percent(root, narrow):
    batch = narrow.read(narrow.rows()[:8], signals=("hidden/1", "hidden/2"))
    hidden, _ = of_documents(root, batch)
    counted = batch["segment_ids"] > 0
    for layer in (1, 2):
        stored = batch[f"hidden/{layer}"]
        assert stored.dtype == np.float32
        error = np.linalg.norm(stored - hidden[layer], axis=-1)[counted]
        assert (error / np.linalg.norm(hidden[layer], axis=-1)[counted]).max() < 0.01
        assert (stored[~counted] == 0).all()


def test_one_byte_maps_are_near_in_total_variation(root, narrow):
    batch = narrow.read(narrow.rows()[:8], signals=("attention/0", "attention/1"))
    _, maps = of_documents(root, batch)
    counted = batch["segment_ids"] > 0
    for block in (0, 1):
        stored = batch[f"attention/{block}"]
        assert stored.dtype == np.float32
        distance = 0.5 * np.abs(stored - maps[block]).sum(-1).transpose(0, 2, 1)[counted]
        assert distance.max() < 0.016
        single = (maps[block] == 1).any(-1)  # a document's first token attends only to itself
        assert single.any()
        np.testing.assert_array_equal(stored.max(-1)[single], 1)
        assert (stored.transpose(0, 2, 1, 3)[~counted] == 0).all()
        assert (stored[maps[block] == 0] == 0).all()


def test_undecoded_reads_are_the_codes(narrow):
    rows = narrow.rows()[:3]
    signals = ("hidden/1", "attention/0")
    codes = narrow.read(rows, signals=signals, decode=False)
    values = narrow.read(rows, signals=signals)
    assert codes["hidden/1"].dtype == np.int8
    assert codes["attention/0"].dtype == np.uint8
    # 32 coordinates are one Hadamard block: built here from the definition of the matrix.
    signs = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    mixed = codes["hidden/1"] * codes["hidden/1-scale"].astype(np.float64)[..., None]
    np.testing.assert_allclose(values["hidden/1"], mixed @ signs / np.sqrt(32), atol=1e-5)
    nats = (codes["attention/0"].astype(np.float32) - 255) * (16 / 254)
    expected = np.where(codes["attention/0"] > 0, np.exp(nats), 0)
    np.testing.assert_allclose(values["attention/0"], expected, rtol=1e-6)
    assert "hidden/1-scale" not in values


def test_the_mean_over_heads_is_one_head(root, cache):
    mean = tiny_cache(
        root,
        attention=Attention(layers=(1,), heads="mean", dtype="bfloat16"),
        output=root / "mean",
    )
    batch = mean.read(mean.rows()[:4], signals=("attention/1",))
    _, maps = of_documents(root, batch)
    assert batch["attention/1"].shape == (4, 1, 64, 64)
    np.testing.assert_allclose(
        batch["attention/1"][:, 0].astype(np.float64),
        maps[1].mean(1),
        rtol=2**-8 * 1.01,
        atol=1e-6,
    )


def test_a_width_keeps_the_principal_directions_of_the_sample(root):
    cache = tiny_cache(root, hidden=Hidden(layers=(1,), width=6), output=root / "projected")
    signal, directions = cache.manifest.signals["hidden/1"], cache.directions("hidden/1")
    assert directions is not None
    np.testing.assert_allclose(directions.T @ directions, np.eye(6), atol=1e-5)

    rows = read_plan(cache.path / "parts/0000/plan.json").rows
    first = np.cumsum([0] + [unit.rows for unit in rows.units])
    places = sample_places(rows, length=64)
    sample = cache.read(np.array([first[unit] + offset for unit, offset in places]))
    states = of_documents(root, sample)[0][1][sample["segment_ids"] > 0]
    centred = states - states.mean(0)
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    share = (singular[:6] ** 2).sum() / (singular**2).sum()
    assert signal.variance_kept == pytest.approx(share, abs=1e-4)
    overlap = np.linalg.svd(vectors[:6] @ directions)[1]  # cosines between the two spaces
    assert overlap.min() > 0.999

    batch = cache.read(cache.rows()[:4], signals=("hidden/1",))
    hidden, _ = of_documents(root, batch)
    projected = (hidden[1] @ directions.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(
        batch["hidden/1"].astype(np.float32), projected, rtol=2**-8 * 1.01, atol=1e-4
    )


def test_states_of_full_width_have_no_directions(cache):
    assert cache.directions("hidden/1") is None


def test_rows_come_in_the_order_asked_for(cache):
    names = ("logits", "hidden/1", "attention/0")
    rows = np.array([90, 3, 41, 3])
    together = cache.read(rows, signals=names)
    for slot, row in enumerate(rows.tolist()):
        alone = cache.read([row], signals=names)
        for name, array in alone.items():
            np.testing.assert_array_equal(together[name][slot], array[0], err_msg=name)


def test_captured_twice_the_bytes_are_the_same(root, cache):
    again = tiny_cache(root, hidden=EVERY_LAYER, attention=EVERY_MAP, output=root / "again")
    assert again.manifest.cache_id == cache.manifest.cache_id
    for path in (cache.path / "parts/0000").rglob("*"):
        if path.is_file() and path.parent.parent.name in ("hidden", "attention"):
            other = again.path / path.relative_to(cache.path)
            assert other.read_bytes() == path.read_bytes(), path


def test_four_devices_store_what_one_stores(root, cache):
    """Two devices split every matrix, and two split the batch."""
    script = (
        "import sys, pathlib, dataclasses; from decant.schemas.manifest.plan import TeacherMesh;"
        "from tests.making.caches import tiny_settings;"
        "from decant.pipelines.capture.job import precompute;"
        "from tests.pipelines.capture.test_array_capture import EVERY_LAYER, EVERY_MAP;"
        "root = pathlib.Path(sys.argv[1]);"
        "config = tiny_settings(root, hidden=EVERY_LAYER, attention=EVERY_MAP,"
        " output=root / 'four-devices');"
        "teacher = dataclasses.replace(config.teacher, mesh=TeacherMesh(tensor=2));"
        "precompute(dataclasses.replace(config, teacher=teacher))"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "PYTHONPATH": str(Path.cwd()),
    }
    subprocess.run([sys.executable, "-c", script, str(root)], env=environment, check=True)
    again = open_cache(root / "four-devices")
    signals = ("hidden/2", "attention/1")
    ours, theirs = (c.read(c.rows(), signals=signals) for c in (cache, again))
    for name in signals:
        np.testing.assert_allclose(
            ours[name].astype(np.float32),
            theirs[name].astype(np.float32),
            rtol=2**-7,  # the neighbouring bfloat16
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": Hidden(layers=(3,))}, r"no layer 3; this teacher has 0 .* to 2 .*also -1"),
        ({"hidden": Hidden(layers=(-2,))}, r"signals.hidden.layers is -2"),
        ({"hidden": Hidden(layers=(2, -1))}, r"\[2, -1\]: names one twice"),
        ({"hidden": Hidden(layers=(1,), width=32)}, "states are 32 wide"),
        ({"attention": Attention(layers=(2,))}, "no block 2; this teacher has 0 to 1"),
        ({"attention": Attention(layers=(0,), heads=(4,))}, "heads 0 to 3"),
        ({"attention": Attention(layers=(0,), heads=())}, "heads 0 to 3"),
    ],
)
def test_layers_and_heads_that_the_teacher_lacks_are_refused_before_anything_is_written(
    root, settings, message
):
    with pytest.raises(ValueError, match=message):
        precompute(tiny_settings(root, output=root / "refused", **settings))
    assert not (root / "refused").exists()


def test_arrays_that_cannot_fit_the_disk_are_refused_before_the_teacher_runs(root, monkeypatch):
    free = 50_000  # 101 rows of 64 states of 32 numbers take 413 kB

    def usage(path):
        return type("Usage", (), {"free": free})

    monkeypatch.setattr("decant.pipelines.capture.disk_space.shutil.disk_usage", usage)
    with pytest.raises(ValueError, match=r"50\.0 kB free, but 101 rows .*\(hidden/1 277\.2 kB"):
        precompute(tiny_settings(root, output=root / "full", hidden=Hidden(layers=(1,))))
    assert not (root / "full/parts/0000/plan.json").exists()
