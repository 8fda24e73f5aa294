"""Templates that loop for ever or fill the memory: refused soon, by a process with limits."""

import json
import subprocess
import sys

import pytest

DEEP = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
DOUBLED = (
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = EXPR %}{% endfor %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
BOMBS = {
    "loops": LOOP,
    "loops that write": LOOP.replace("BODY", "x" * 100),
    "loops over nothing": LOOP.replace("range(99999) %}BODY", "range(99999) if false %}"),
    "loops that recurse": "{% for i in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "loops in filters": LOOP.replace("BODY", "{% set x = range(99999) | map('string') | list %}"),
    "macros": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macros that branch": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "callers": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "a long text": "{{ 'a' * (10**10) }}",
    "a long text of a constant": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ [0] * (10**10) }}",
    "a list of texts": "{% set x = [('a' * (10**6))] * (10**5) %}{{ x }}",
    "a large number": "{{ 2**(10**9) }}{{ (2**10)**(10**8) }}",
    "numbers that grow": DOUBLED.replace("'ab'", "3").replace("EXPR", "ns.x * ns.x"),
    "texts that grow": DOUBLED.replace("EXPR", "ns.x ~ ns.x"),
    "sums that grow": DOUBLED.replace("EXPR", "ns.x + ns.x"),
    "joins that grow": DOUBLED.replace("EXPR", "ns.x.join([ns.x, ns.x])"),
    "joins of a filter that grow": DOUBLED.replace("EXPR", "[ns.x, ns.x] | join(ns.x)"),
    "replacements that grow": DOUBLED.replace("EXPR", "ns.x.replace('a', ns.x)"),
    "replacements by a filter that grow": DOUBLED.replace("EXPR", "ns.x | replace('', ns.x)"),
    "formats that grow": DOUBLED.replace("EXPR", "'%s%s' % (ns.x, ns.x)"),
    "formats by a method that grow": DOUBLED.replace("EXPR", "'{0}{0}'.format(ns.x)"),
    "formats by a filter that grow": DOUBLED.replace("EXPR", "'%s%s' | format(ns.x, ns.x)"),
    "blocks that grow": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}"
    ),
    "lists that grow": DOUBLED.replace("'ab'", "[1]").replace("EXPR", "ns.x + ns.x"),
    "lists of slices": (
        "{% set ns = namespace(x=[]) %}{% set t = 'a' * (10**6) %}{% for i in range(9999) %}"
        "{% set ns.x = ns.x + [t[1:]] %}{% endfor %}"
    ),
    "lists in lists": DEEP + "{% endfor %}{{ ns.x }}",
    "tuples in tuples": DEEP.replace("[ns.x, ns.x]", "(ns.x, ns.x)") + "{% endfor %}",
    "tables in tables": DEEP.replace("[ns.x, ns.x]", "{1: ns.x, 2: ns.x}") + "{% endfor %}",
    "names in names": (
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ [ns] | string }}{{ ns ~ ns }}"
    ),
    "a sum of lists": "{{ ([[0] * (10**5)] * (10**5)) | sum(start=[]) }}",
    "a join of one text": "{{ ','.join(([('a' * (10**6))] * (10**5)) | map('string')) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a width from outside": "{{ '%*d' % (10**9, 1) }}",
    "a wide format by a filter": "{{ '%01000000000d' | format(1) }}",
    "a wide format by a method": "{{ '{:>1000000000}'.format(1) }}",
    "a nested width": "{{ '{:>{}}'.format(1, 10**9) }}",
    "a wide centre": "{{ 'a' | center(10**9) }}",
    "a wide constant": "{{ 'a' | center(1000000000) }}",
    "a wide line": "{{ ('a\n' * (10**6)) | indent(10**5) }}",
    "a wide table": "{{ messages | tojson(indent=10**9) }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "many columns": "{{ [1] | slice(10**9) | list }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "random text": "{{ lipsum(n=100) }}",
    "random choice": "{{ [1, 2] | random }}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "many names": "{{ a" + ".a" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "a long template": "a" * (2 << 20),
}
PROCESS = """
import json, resource, sys, time
from decant.models.text.chat_template import ChatTemplate
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
answers = {}

def peak_megabytes():
    # Not ru_maxrss: a child inherits that of the process that started it.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10

for name, source in json.load(sys.stdin).items():
    begun = time.monotonic()
    try:
        template = ChatTemplate(source, tokens={}, date="2026-01-31", where="here")
        answer = template.render([{"role": "user", "content": "Hi"}]).text[:100]
    except ValueError as error:
        answer = f"ValueError: {error}"
    seconds = time.monotonic() - begun
    answers[name] = [answer, seconds, peak_megabytes()]
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers():
    process = subprocess.run(
        [sys.executable, "-c", PROCESS],
        input=json.dumps(BOMBS),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_wants_too_much_is_refused_soon(answers, name):
    answer, seconds, _ = answers[name]
    assert answer.startswith("ValueError: "), answer
    assert len(answer) < 700
    assert seconds < 20  # most take a millisecond; the machine may be busy


def test_no_template_takes_much_memory(answers):
    assert max(megabytes for _, _, megabytes in answers.values()) < 2000
