"""The reward for programs: the layouts of several data sets, and programs that attack it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from reward_models import build_reward, code, sandbox
from reward_models.base import MissingColumnError
from reward_models.code import program_of
from reward_models.sandbox import _packages as packages
from reward_models.sandbox import missing_isolation

sys.path.insert(0, str(Path(__file__).parent))
from hostile_programs import ATTACKS, PRINTED, TAIL, VERDICTS

isolates = pytest.mark.skipif(
    missing_isolation() is not None, reason=f"no isolation here: {missing_isolation()}"
)
CHECK = """
METADATA = {}
def close(a, b): return abs(a - b) < 1e-6
def check(candidate):
    assert close(candidate(2), 4) and candidate(2) == 4
    assert candidate(3) == 9
"""
SQUARE = "def f(x):\n    return x * x\n"


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def scored(programs, prompt="Write f.", *, raw=False, **columns):
    """Score programs that share a prompt and the columns of their row."""
    options = {"timeout_s": 2.0, "workers": 2} | columns.pop("options", {})
    reward = build_reward({"kind": "code", **options})
    said = [text if raw else fenced(text) for text in programs]
    rows = {name: [value] * len(programs) for name, value in columns.items()}
    return reward(prompts=[prompt] * len(programs), completions=said, **rows), reward


@isolates
def test_an_environment_below_tmp_is_readable_and_tmp_itself_empty(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        # The program may run as another user.
        Path(folder).chmod(0o755)
        (Path(folder) / "inside.txt").write_text("9")
        monkeypatch.setattr(sandbox, "_packages", lambda: [*packages(), folder])
        # The checkout itself may be below /tmp.
        below = {p.split("/")[2] for p in (*packages(), folder) if p.startswith("/tmp/")}
        program = f"""
            import os
            def f(x):
                assert set(os.listdir("/tmp")) == {below!r}
                try:
                    open("{folder}/new.txt", "w")
                except OSError:
                    return int(open("{folder}/inside.txt").read())
        """
        test = "def check(candidate):\n    assert candidate(3) == 9\n"
        found, _ = scored([textwrap.dedent(program)], test=test, entry_point="f")
        assert found == [1.0]
        assert os.listdir(folder) == ["inside.txt"]


@isolates
def test_humaneval_rows_take_a_whole_function_and_a_continuation():
    prompt = 'from math import sqrt\n\ndef f(x):\n    """Square x."""\n'
    found, _ = scored(
        [
            "    return x * x\n",
            SQUARE,
            "def f(x):\n    return int(sqrt(x ** 4))\n",
            "    return x\n",
        ],
        prompt,
        test=CHECK,
        entry_point="f",
    )
    assert found == [1.0, 1.0, 1.0, 0.0]
    # In a conversation the last turn asks.
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    assert scored(["    return x * x\n"], turns, test=CHECK, entry_point="f")[0] == [1.0]
    # As base models continue it: without a fence.
    assert scored(["    return x * x\n"], prompt, raw=True, test=CHECK, entry_point="f")[0] == [1.0]


@isolates
def test_helpers_of_the_prompt_are_not_the_programs_to_define():
    # HumanEval/32: the tests judge by a function that stands in the prompt.
    prompt = "def poly(x):\n    return x - 5\n\ndef f():\n    '''Return the root.'''\n"
    test = "def check(candidate):\n    assert abs(poly(candidate())) < 1e-4\n"
    programs = ["def f(): return 5", "def poly(x): return 0\ndef f(): return 1"]
    assert scored(programs, prompt, test=test, entry_point="f")[0] == [1.0, 0.0]


@isolates
def test_mbpp_rows_and_the_fraction_of_the_tests_that_pass():
    tests = ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1", "assert f(0.5) == 0.25"]
    whole, _ = scored([SQUARE, "def f(x): return abs(x) * 2"], test_list=tests)
    assert whole == [1.0, 0.0]
    # By hand: of 4, 9, 1 and 0.25, twice the amount is right for the first only.
    part, _ = scored(
        [SQUARE, "def f(x): return abs(x) * 2"], test_list=tests, options={"partial": True}
    )
    assert part == [1.0, 0.25]


@isolates
@pytest.mark.parametrize("column", ["input_output", "ground_truth", "reward_model"])
def test_pairs_of_input_and_output(column: str):
    cases = {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9"]}
    value = {"ground_truth": json.dumps(cases)} if column == "reward_model" else json.dumps(cases)
    programs = [
        "x = int(input())\nprint(x * x)",
        "import sys\nif __name__ == '__main__': print(int(sys.stdin.read()) ** 2, end='  \\n')",
        # Competitors write at exit and run in threads with a larger stack.
        "import atexit, os, threading\ndef g():\n    x = int(input())\n"
        "    atexit.register(lambda: os.write(1, str(x * x).encode()))\n"
        "threading.Thread(target=g).start()",
        "print(4)",
        "x = input()\nprint(x * 2)",
    ]
    assert scored(programs, **{column: value})[0] == [1.0, 1.0, 1.0, 0.0, 0.0]


@isolates
def test_calls_with_arguments_of_json():
    # APPS wraps the result in a list; LeetCode has a class; LiveCodeBench writes lines of JSON.
    apps = {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]}
    leet = "class Solution:\n    def f(self, x): return x * x"
    assert scored([SQUARE, leet, "def f(x): return x"], input_output=json.dumps(apps))[0] == [
        1,
        1,
        0,
    ]
    cases = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
    adds = "def add(xs, n): return tuple(x + n for x in xs)"
    assert scored([adds, SQUARE], public_test_cases=json.dumps(cases), entry_point="add")[0] == [
        1,
        0,
    ]


@isolates
def test_files_of_test_functions_and_objects_that_stay_with_the_program():
    tests = """
from solution import Stack, sort, count, fail
def test_stack():
    stack = Stack(); stack.push(3); stack.push((1, {2: b"x"}))
    assert stack.pop() == (1, {2: b"x"}) and stack.items == [3]
def test_in_place():
    xs = [3, 1]; assert sort(xs) is None and xs == [1, 3]
def test_iterator():
    assert list(count(3)) == [0, 1, 2]
def test_error():
    try: fail()
    except ValueError as error: assert str(error) == "no"
    else: assert False
"""
    right = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
def sort(xs): xs.sort()
def count(n): yield from range(n)
def fail(): raise ValueError("no")
"""
    assert scored([right, right.replace('"no"', '"yes"')], tests=tests)[0] == [1.0, 0.0]


@isolates
@pytest.mark.parametrize(
    "columns",
    [
        # LiveCodeBench, and DeepCoder's version of it: the name is beside the tests or the case.
        {
            "public_test_cases": json.dumps(
                [{"input": "2\n3", "output": "6", "testtype": "functional"}]
            ),
            "metadata": json.dumps({"func_name": "f"}),
        },
        {
            "tests": json.dumps(
                [
                    {
                        **{"input": "2\n3", "output": "6", "testtype": "functional"},
                        "metadata": {"func_name": "f"},
                    }
                ]
            )
        },
        # Verifiable coding problems of PrimeIntellect and open-r1.
        {
            "verification_info": {
                "language": "python",
                "test_cases": [
                    {"fn_name": "f", "input": "[2, 3]", "output": "[6]", "type": "function_call"}
                ],
            }
        },
        # LeetCodeDataset.
        {
            "test": "def check(candidate):\n    assert candidate(a=2, b=3) == 6\n",
            "entry_point": "Solution().f",
        },
    ],
)
def test_functions_are_called_in_every_layout_and_not_run_as_programs(columns):
    # LeetCode provides List, gcd and pow with three arguments without an import.
    right = "class Solution:\n    def f(self, a: int, b: int) -> int:\n        return gcd(6, a * b)"
    wrong = right.replace("gcd(6, a * b)", "List[int] and pow(2, 3, 5)")
    assert scored([right, wrong], **columns)[0] == [1.0, 0.0]


def test_a_function_that_no_column_names_is_invalid_and_not_zero():
    cases = [{"input": "2", "output": "4", "testtype": "functional"}]
    both = [*cases, {"input": "2", "output": "4", "testtype": "stdin"}]
    for columns, reason in (
        ({"test_cases": cases}, "the tests call a function that the row does not name"),
        (
            {"test_cases": both, "entry_point": "f"},
            "tests of several functions, or of a function and of input",
        ),
        (
            {"test": "assert f(2) == 4", "entry_point": "a b"},
            "entry_point is not the name of a function",
        ),
    ):
        found, reward = scored([SQUARE], options={"isolation": "limits"}, **columns)
        assert (found, reward.invalid) == ([None], {reason: 1})


VALUES = {
    "datetime.date(2020, 1, 2)": "datetime.date(2020, 1, 3)",
    "datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)": "datetime.datetime(2020, 1, 2, 3)",
    "datetime.timedelta(days=-1, microseconds=2)": "datetime.timedelta(days=-1, microseconds=1)",
    "decimal.Decimal('0.10')": "decimal.Decimal('0.11')",
    "fractions.Fraction(1, 3)": "fractions.Fraction(2, 3)",
    "collections.namedtuple('P', 'x y')(1, [2])": "(1, [3])",
    "collections.Counter('aab')": "{'a': 1}",
}


@isolates
def test_values_of_the_standard_library_are_compared():
    head = "import collections, datetime, decimal, fractions\n"
    right, wrong = (f"{head}def f(): return [{', '.join(x)}]" for x in (VALUES, VALUES.values()))
    tests = [f"{head}assert f()[{i}] == {text}" for i, text in enumerate(VALUES)]
    found, _ = scored([right, wrong], test_list=tests, options={"partial": True})
    assert found == [1.0, 0.0]
    # The fields of a named tuple have their names.
    assert scored([right], test_list=["assert f()[5].y == [2]"])[0] == [1.0]


@isolates
def test_arrays_are_compared_passed_and_changed_in_place():
    program = """
import numpy as np
def f(x): return np.outer(x, x).astype("int32")
def g(x): x += 1
"""
    tests = """
import numpy as np
def test_f():
    found = f(np.array([1, 2]))
    assert found.dtype == np.int32 and np.array_equal(found, [[1, 2], [2, 4]])
    x = np.zeros((2, 2)); g(x); assert x.tolist() == [[1.0, 1.0], [1.0, 1.0]]
"""
    assert scored([program, program.replace("x += 1", "pass")], tests=tests)[0] == [1.0, 0.0]


OBJECTS = """
class Base(Exception): pass
class Empty(Base): pass
class Bad(ValueError): pass
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
    def __add__(self, other): return Point(self.x + other.x)
    def __len__(self): return self.x
    def __getitem__(self, i): return i * self.x
    def __repr__(self): return f"Point({self.x})"
    def __enter__(self): return self
    def __exit__(self, *error): self.x = 0
def fail(kind): raise {"empty": Empty, "bad": Bad, "utf": UnicodeDecodeError}[kind](
    *(("utf-8", b"x", 0, 1, "no") if kind == "utf" else (kind, 3)))
def count():
    yield 1
"""


@isolates
def test_objects_of_the_program_are_used_as_python_uses_them():
    tests = [
        "assert Point(2) == Point(2) and Point(2) != Point(3)",
        "assert sorted([Point(3), Point(2)])[0].x == 2 and (Point(1) + Point(2)).x == 3",
        "assert len(Point(2)) == 2 and Point(2)[4] == 8 and not Point(0) and str(Point(2)) == "
        "'Point(2)'",
        "assert isinstance(Point(1), Point) and not isinstance(1, Point)",
        "with Point(1) as p: pass\nassert p.x == 0",
        "it = count()\nassert next(it) == 1\ntry: next(it)\nexcept StopIteration: pass\n"
        "else: assert False",
        "try: fail('empty')\nexcept Empty as error: assert error.args == ('empty', 3)\n"
        "else: assert False",
        "try: fail('empty')\nexcept Base: pass\nelse: assert False",
        "try: fail('bad')\nexcept ValueError: pass\nelse: assert False",
        "try: fail('utf')\nexcept ValueError as error: assert error.object == b'x'\n"
        "else: assert False",
    ]
    found, _ = scored([OBJECTS], test_list=tests, options={"partial": True})
    assert found == [1.0]
    # An error of another kind is not caught.
    caught = "try: fail('empty')\nexcept (ValueError, RuntimeError): pass"
    assert scored([OBJECTS], test_list=[caught])[0] == [0.0]


@isolates
def test_a_module_that_only_the_tests_need_and_that_is_missing_is_invalid_and_not_zero():
    tests = "import a_package_that_is_missing\ndef test_f():\n    assert f(2) == 4\n"
    found, reward = scored([SQUARE], tests=tests)
    reason = "the row's tests need the module a_package_that_is_missing, which is missing"
    assert (found, reward.invalid) == ([None], {reason: 1})
    # One that the program needs is its own choice, and a name that it lacks is its fault.
    assert scored([f"import a_package_that_is_missing\n{SQUARE}"], tests="assert f(2) == 4")[0] == [
        0.0
    ]
    assert scored([SQUARE], tests="from solution import g\nassert g(2) == 4")[0] == [0.0]


@isolates
def test_a_setup_that_fails_makes_a_wrong_response_invalid_and_not_zero():
    # Without the package even a correct response could fail, so that 0 would blame it.
    tests, programs = ["assert f(2) == 4"], [SQUARE, "def f(x): return x"]
    row = {"test_list": tests, "test_setup_code": "import a_package_that_is_missing"}
    found, reward = scored(programs, **row)
    assert found == [1.0, None]
    assert "ModuleNotFoundError: No module named 'a_package_that_is_missing'" in str(reward.invalid)
    # The program's own names are there, with or without an import of the row's.
    row["test_setup_code"] = "from solution import f"
    assert scored(programs, **row)[0] == [1.0, 0.0]


@isolates
def test_what_no_program_can_be_judged_by_is_invalid_and_not_zero():
    for columns, reason in (
        ({"tests": None}, "no tests in the row"),
        ({"tests": "x = 1"}, "the tests call no function of the program"),
        ({"answer": "4"}, "the tests call no function of the program"),
        ({"tests": "{'a'"}, "tests begin like JSON and are none"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs for 0 outputs"),
        ({"tests": "assert f(lambda: 1) == 1"}, "a test passes a function to the program"),
    ):
        found, reward = scored([SQUARE], **columns)
        assert (found, reward.invalid) == ([None], {reason: 1})
    with pytest.raises(MissingColumnError, match="no column with tests"):
        scored([SQUARE], label="4")


def test_the_program_of_a_response():
    two = "```python\ndef f(): pass\n```\nUse it:\n```python\nprint(f())\n```"
    assert program_of(two) == "print(f())\n"
    assert program_of(two, "f") == "def f(): pass\n"
    # Cut off while thinking: what stands there is no answer yet.
    assert program_of("<think>\n```python\nx\n```\n") is None
    assert (
        program_of("<think>```python\nx\n```</think>\n```py\na\n```\nthen\n```python\nb\n```")
        == "b\n"
    )
    assert program_of("```bash\nls\n```") is None
    assert program_of("```python\ncut off") is None
    assert program_of("return 1") == "return 1"
    assert program_of("  ") is None
    # Linear in the length: this takes minutes with a pattern that goes back.
    assert program_of("```a\n" * 200_001) is None


def filled(program: str, places: dict[str, object]) -> str:
    head = "".join(f"{name} = {value!r}\n" for name, value in places.items())
    return f"{head}won = False\n{program}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make what the programs are after: a secret, rows, two servers, and a process to signal."""
    monkeypatch.setenv("API_KEY", "s3cret")
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "rows.jsonl").write_text("check(candidate)")
    tmp_path.chmod(0o777)
    heard: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    kept = [signal.signal(number, lambda got, _: heard.append(got)) for number in numbers]
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        named.bind(str(tmp_path / "s"))
        abstract.bind(f"\0align-{os.getpid()}")
        for server in (named, abstract):
            server.listen()
        places = {
            **{"SECRET": f"{tmp_path}/secret", "ROWS": f"{tmp_path}/rows.jsonl"},
            **{"PLACE": str(tmp_path), "PORT": tcp.getsockname()[1]},
            **{"SOCKET": f"{tmp_path}/s", "ABSTRACT": f"\0align-{os.getpid()}"},
            **{"PARENT": os.getpid(), "MARK": f"mark-{os.getpid()}"},
        }
        yield places
        for server in (tcp, named, abstract):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
    for number, handler in zip(numbers, kept, strict=True):
        signal.signal(number, handler)
    assert heard == []


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:  # it has just ended
            continue
    return found


@isolates
def test_hostile_programs_are_contained_and_none_passes(machine, tmp_path: Path):
    attacks = {name: filled(text + TAIL, machine) for name, text in ATTACKS.items()}
    programs = VERDICTS | attacks
    assert len(programs) + len(PRINTED) >= 40
    before = sorted(path.name for path in tmp_path.iterdir())
    limits = {"timeout_s": 1.0, "memory_gib": 0.25}
    found, reward = scored(
        [*programs.values(), SQUARE], test=CHECK, entry_point="f", options=limits
    )
    # The last is the right one: it shows that these tests can be passed.
    assert dict(zip([*programs, "right"], found, strict=True)) == dict.fromkeys(programs, 0.0) | {
        "right": 1.0
    }
    cases = json.dumps({"inputs": ["2", "3"], "outputs": ["4", "9"]})
    said, _ = scored(list(PRINTED.values()), input_output=cases, options=limits)
    assert dict(zip(PRINTED, said, strict=True)) == dict.fromkeys(PRINTED, 0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert machine["MARK"] not in os.listdir("/dev/shm")
    assert not [text for text in commands() if machine["MARK"] in text]
    assert not reward.invalid


@isolates
def test_the_attacks_succeed_where_they_are_let(machine):
    # Without isolation the file is there to be read: the attack is real, and its success shows.
    attack = [filled(ATTACKS["reads a secret"] + TAIL, machine)]
    open_to_it, _ = scored(attack, test=CHECK, entry_point="f", options={"isolation": "limits"})
    assert open_to_it == [1.0]
    # The network is closed even so.
    network = [filled(ATTACKS["asks the loopback"] + TAIL, machine)]
    closed, _ = scored(network, test=CHECK, entry_point="f", options={"isolation": "limits"})
    assert closed == [0.0]


def test_a_machine_that_cannot_isolate_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "missing_isolation", lambda: "unshare: Operation not permitted")
    with pytest.raises(ValueError, match=r"cannot isolate programs \(unshare: Operation not perm"):
        build_reward({"kind": "code"})
    assert build_reward({"kind": "code", "isolation": "limits"}).name == "code"


@isolates
def test_the_refusal_of_the_kernel_is_the_reason():
    # As in a container: a filter of system calls that denies unshare, and nothing else.
    text = """
import platform, runpy
from reward_models import sandbox
isolate = runpy.run_path(str(sandbox.HERE / "isolate.py"))
numbers = isolate["ARCHITECTURES"][platform.machine()][1]
for name in numbers.keys() - {"unshare", "clone", "clone3"}:
    del numbers[name]
isolate["checked"](isolate["LIBC"].prctl(38, 1, 0, 0, 0), "prctl")
isolate["deny_system_calls"]()
print(sandbox.missing_isolation())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert "unshare: Operation not permitted" in done.stdout, done.stderr


@isolates
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("python", [sys.executable, "/usr/bin/python3"])
def test_a_user_without_rights_has_the_same_sandbox(python: str):
    folder = Path(code.__file__).parent
    text = f"""
import sys
assert sys.version_info >= (3, 11), "too old"
sys.path.insert(0, {str(folder)!r})
import sandbox
print(sandbox.missing_isolation())
found = sandbox.run_program("import os; print(os.listdir('/tmp'), os.getpid() < 9, os.getuid())\\n"
    "for _ in range(99): os.fork()", [""], sandbox.Limits(timeout_s=1.0))
print(found[0][1])
"""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    try:
        done = subprocess.run(
            [python, "-c", text], **nobody, capture_output=True, text=True, timeout=300, cwd="/"
        )
    except (PermissionError, FileNotFoundError):
        pytest.skip(f"no {python} for other users")
    if "too old" in done.stderr or "No module named 'sandbox'" in done.stderr:
        pytest.skip(f"{python} cannot run it: {done.stderr[-200:]}")
    # The fork bomb ended at its limit, with an error, and its output is what came before.
    assert done.stdout.startswith("None\n[] True 65534\n"), done.stdout + done.stderr


@isolates
def test_the_preflight_runs_the_solutions_of_the_rows():
    from align.core.types import PromptRow
    from align.preflight.rewards import self_test
    from reward_models.specs import CodeSpec

    def found(solutions: list[str]):
        rows = [
            PromptRow((0,), f"Write f{i}.", {"tests": f"assert f{i}(1) == {i}", "code": solution})
            for i, solution in enumerate(solutions)
        ]
        spec = CodeSpec(kind="code", timeout_s=2.0)
        return self_test(spec, build_reward(spec), prompts=rows, answers=None)

    right = found(["def f0(x): return 0", "def f1(x): return x"])
    assert (right.verdict, right.value.partition(",")[0]) == ("ok", "right above wrong in 2 of 2")
    wrong = found(["def f0(x): return 0", "def f1(x): return 2"])
    assert wrong.verdict == "warn"
    assert "the solutions of 1 of 2 rows do not pass their tests" in wrong.remedy
