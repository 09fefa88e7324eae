"""Hostile inputs: recipes, rows, chat templates and model folders of strangers."""

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.faults.campaign import damages, recipe
from tests.faults.campaign.align_run import align
from tests.faults.campaign.changes import DATA
from tests.faults.campaign.kills import begin, prepare
from tests.faults.campaign.ledger import Failed, Fault, Place, no_traceback, refused

MOST_CPU_S = 120
"""Processor time of a stage; it needs one second."""
MOST_MEMORY = 8 * 2**30
"""Address space of a stage; its libraries alone map 3 GiB."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        "",
        " ",
        [],
        {},
        [[]],
        {"": ""},
        True,
        False,
        0,
        -1,
        1,
        0.5,
        -0.0,
        2**31,
        2**63,
        10**30,
    ),
    *(float("inf"), float("-inf"), float("nan"), "1", "null", "../..", "/", "/dev/zero", "."),
    *("${HOME}", "${NO_SUCH_VARIABLE}", "x" * 5000, "a\x00b", "\x1b[2J", "\u202e", "\ud7ff", "é"),
    *(["a", 1, None], {"a": {"b": {"c": []}}}, [[[[[[]]]]]], "{{ 7 * 7 }}", "%s%n", "!!python/x"),
)
"""Values that stand where another one was expected."""
PARTS = (
    *(
        "\t",
        ": ",
        "- ",
        "&a [*a]",
        "*nobody",
        "<<: 1",
        "!!python/object/apply:os.system [true]",
        "%",
    ),
    *(
        "{{{{",
        "]]]]",
        '"',
        "'",
        "|",
        ">",
        "\x00",
        "\x85",
        "\ufeff",
        "? [1] : 2",
        "---\n",
        "...\n",
        "@",
    ),
)
"""Pieces of text that mean something to YAML."""
ROW_STAGES = ("sft", "kto", "dpo", "classify", "grpo", "trl", "curate", "weak_label", "base")
FILE_STAGES = ("sft", "classify", "grpo", "base")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every hostile input."""
    for i in range(3 if quick else 100):
        yield Fault("a value of a recipe that does not fit", str(i), _recipe_value, 0.5)
    for i in range(3 if quick else 60):
        yield Fault("a recipe that is damaged as text", str(i), _recipe_text, 0.5)
    for stage in ("sft",) if quick else ROW_STAGES:
        for i in range(2 if quick else 6):
            yield Fault("a value of a row that does not fit", f"{stage} {i}", partial(_row, stage))
        for name in damages.DAMAGES if not quick and stage in FILE_STAGES else ():
            if name in ("delete", "swap", "double"):
                continue
            inject = partial(_data_file, stage, name)
            yield Fault("a file that does not contain data", f"{stage} {name}", inject)
    if quick:
        return
    for name in TEMPLATES:
        yield Fault("a hostile chat template", name, partial(_template, name), 5.0)
    for name in LIES:
        yield Fault("a model folder that lies", name, partial(_model, LIES[name]), 2.0)
    for file in MODEL_FILES:
        for i in range(10):
            inject = partial(_model, partial(_json_value, file))
            yield Fault("a value of a model's file that does not fit", f"{file} {i}", inject, 2.0)
    for file in (*MODEL_FILES, "model.safetensors"):
        for name in damages.DAMAGES:
            inject = partial(_model, partial(_damaged, file, name))
            yield Fault("a damaged file of a model", f"{file} {name}", inject, 2.0)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a tree, the inner ones too."""
    if path:
        yield path
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set the value at a path of a tree."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def _check(place: Place) -> None:
    """Run `align check`: the recipe is right or refused, at once and in plain words."""
    code, said = align(place.folder, "check", "recipe.yaml")
    no_traceback(said)
    if code != 0:
        refused(code, said, names="recipe.yaml")


def _recipe_value(place: Place) -> None:
    prepare(place, "base")
    path = place.folder / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    for _ in range(place.rng.choice((1, 1, 2))):
        put(tree, place.rng.choice(list(leaves(tree))), place.rng.choice(VALUES))
        if not isinstance(tree.get("stages"), dict):
            break
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    _check(place)


def _recipe_text(place: Place) -> None:
    prepare(place, "base")
    path, rng = place.folder / "recipe.yaml", place.rng
    text = path.read_text()
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(text))
        how = rng.randrange(4)
        piece = rng.choice(PARTS)
        text = (
            text[:at] + piece + text[at:],
            text[:at] + text[at + rng.randrange(40) :],
            text[: at + 1],
            text[:at] + text[at : at + 60] * rng.choice((2, 300)) + text[at:],
        )[how]
    path.write_text(text, encoding="utf-8")
    if rng.random() < 0.2:
        damages.damage(rng.choice(("flip", "zeros", "not utf-8", "noise", "deep")), path, rng)
    _check(place)


def _stage_or_refusal(place: Place, stage: str, *, names: str) -> None:
    """Run a stage: it ends well, or refuses its input in one line, and soon."""
    run = begin(place, stage, hook=_bounded)
    codes, said = run.wait(), run.said()
    no_traceback(said)
    if codes[0] != 0:
        refused(codes[0], said, names=names)


def _bounded() -> None:
    """Let this process fail, and not the machine, on an input that wants all memory or time."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))


def _row(stage: str, place: Place) -> None:
    prepare(place, stage)
    path = place.folder / "data" / f"{DATA[stage]}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = place.rng.choice(rows)
    put(row, place.rng.choice(list(leaves(row))), place.rng.choice(VALUES))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _stage_or_refusal(place, stage, names=path.name)


def _data_file(stage: str, name: str, place: Place) -> None:
    prepare(place, stage)
    path = place.folder / "data" / f"{DATA[stage]}.jsonl"
    damages.damage(name, path, place.rng)
    _stage_or_refusal(place, stage, names=path.name)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x"
TEMPLATES = {
    "endless loops": LOOP + "{% endfor %}" * 3,
    "a text that doubles": "{% set ns = namespace(t='xxxxxxxx') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "a large product": "{{ 'x' * 10 ** 10 }}",
    "a wide field": "{{ '%999999999d' % 1 }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "center": "{{ 'x'.center(999999999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "tojson": "{{ (range(99999) | list * 99) | tojson }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch owned') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "raise": "{{ raise_exception('\x1b]0;owned\x07 no') }}",
    "raise nothing": "{{ raise_exception('') }}",
    "undefined": "{{ nobody.knows.it }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for m in messages %}",
    "constant": "hello",
    "empty": "",
    "blank": " \n",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "NUL": "\x00{{ messages[0].content }}",
    "no roles": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "sleep by sort": "{{ (range(9999) | list * 999) | sort | join }}",
}


def _template(name: str, place: Place) -> None:
    prepare(place, "base")
    (place.folder / "template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    _stage_or_refusal(place, "base", names="template")
    if (place.folder / "owned").exists():
        raise Failed("code of the template ran")


Change = Callable[[Path, random.Random], None]


def _model(change: Change, place: Place) -> None:
    """Bring in a changed model folder: `base` takes it as it is, or refuses it in one line."""
    prepare(place, "base")
    shutil.copytree(place.clean / recipe.RUN / "base" / "model", place.folder / "model")
    (place.folder / "recipe.yaml").write_text(
        "name: run\nstages:\n  base: {kind: base, path: model}\n"
    )
    change(place.folder / "model", place.rng)
    _stage_or_refusal(place, "base", names="(model|token)")
    if (place.folder / "owned").exists():
        raise Failed("code of the model's folder ran")


def _json_value(file: str, model: Path, rng: random.Random) -> None:
    path = model / file
    tree = json.loads(path.read_text())
    put(tree, rng.choice(list(leaves(tree))), rng.choice(VALUES))
    path.write_text(json.dumps(tree))


def _damaged(file: str, name: str, model: Path, rng: random.Random) -> None:
    damages.damage(name, model / file, rng)


def _set(file: str, **values: Any) -> Change:
    def change(model: Path, _rng: random.Random) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _code(model: Path, rng: random.Random) -> None:
    _set("config.json", model_type="evil", auto_map={"AutoConfig": "evil.E"})(model, rng)
    (model / "evil.py").write_text("open('owned', 'w')\nclass E: pass\n")


def _tokenizer_code(model: Path, rng: random.Random) -> None:
    mapped = {"AutoTokenizer": ["evil.E", None]}
    _set("tokenizer_config.json", tokenizer_class="E", auto_map=mapped)(model, rng)
    (model / "evil.py").write_text("open('owned', 'w')\nclass E: pass\n")


def _tensors(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(model: Path, _rng: random.Random) -> None:
        from safetensors.torch import load, save

        path = model / "model.safetensors"
        found = load(path.read_bytes())
        edit(found)
        path.write_bytes(save(found, {"format": "pt"}))

    return change


def _nan(found: dict[str, Any]) -> None:
    found["model.norm.weight"][0] = float("nan")


def _inf(found: dict[str, Any]) -> None:
    found["model.embed_tokens.weight"][3, 1] = float("inf")


def _without(found: dict[str, Any]) -> None:
    del found["model.layers.0.self_attn.q_proj.weight"]


def _narrow(found: dict[str, Any]) -> None:
    found["model.norm.weight"] = found["model.norm.weight"][:3].clone()


def _unknown(found: dict[str, Any]) -> None:
    found["model.extra.weight"] = found["model.norm.weight"].clone()


def _pickle(model: Path, _rng: random.Random) -> None:
    (model / "model.safetensors").unlink()
    code = b"cos\nsystem\n(S'touch owned'\ntR."
    (model / "pytorch_model.bin").write_bytes(code)


def _index(model: Path, _rng: random.Random) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    names = {"model.norm.weight": "../outside.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


LIES: dict[str, Change] = {
    "code of a config": _code,
    "code of a tokenizer": _tokenizer_code,
    "a pickle that runs code": _pickle,
    "an index that leaves the folder": _index,
    "NaN": _tensors(_nan),
    "inf": _tensors(_inf),
    "a tensor missing": _tensors(_without),
    "a tensor too small": _tensors(_narrow),
    "a tensor too many": _tensors(_unknown),
    "no tensors": _tensors(dict.clear),
    "more layers": _set("config.json", num_hidden_layers=3),
    "a thousand layers": _set("config.json", num_hidden_layers=1000),
    "other width": _set("config.json", hidden_size=48),
    "huge vocabulary": _set("config.json", vocab_size=10**9),
    "small vocabulary": _set("config.json", vocab_size=100),
    "unknown kind": _set("config.json", model_type="nobody"),
    "an encoder": _set("config.json", model_type="bert", architectures=["BertModel"]),
    "a stop token that is none": _set("generation_config.json", eos_token_id=10**6),
    "a negative stop token": _set("generation_config.json", eos_token_id=-1),
    "a template that is a number": _set("tokenizer_config.json", chat_template=5),
    "empty folder": lambda model, _: [path.unlink() for path in model.iterdir()] and None,
}
