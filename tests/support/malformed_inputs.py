"""Malformed inputs, one a line, each with the pieces of the error that the command must print.

`{world}` and `{models}` in arguments stand for the folders of tiny sound models and of malformed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

Files = Mapping[str, bytes | str]


class Case(NamedTuple):
    """A malformed input.

    Attributes:
        kind: data, yaml, flags, models, tokenizers or plugins.
        name: what is wrong.
        arguments: of `apportion`; those of kind "rl …" are put behind the flags of a run that would work.
        pieces: texts that the message must hold.
        files: name -> content, written beside it.
        early: no model library may be loaded to find it out.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    pieces: tuple[str, ...]
    files: Files = MappingProxyType({})
    early: bool = True


def _prompts(name: str, content: bytes | str, *pieces: str, file: str = "p.jsonl") -> Case:
    return Case("data", name, ("rl", "--prompts", file), ("prompts: got", *pieces), {file: content})


def _reviews(name: str, content: bytes | str, *pieces: str, file: str = "a.csv") -> Case:
    words = ("reward", "--model", "{world}/policy", "--data", file, "--output", "run")
    return Case("data", name, words, ("data: got", *pieces), {file: content})


def _yaml(name: str, content: bytes | str, *pieces: str) -> Case:
    return Case("yaml", name, ("rl", "--config", "c.yaml"), pieces, {"c.yaml": content})


def _flags(name: str, words: str, *pieces: str) -> Case:
    return Case("flags", name, tuple(words.split("|")), pieces)


def _model(name: str, *pieces: str, flag: str = "policy", kind: str = "models", early: bool = False) -> Case:
    return Case(kind, name, ("rl", f"--{flag}", f"{{models}}/{name}"), pieces, {}, early)


def _plugin(name: str, body: str, *pieces: str, early: bool = False) -> Case:
    head = "import torch\nfrom apportion import Credit\n"
    return Case("plugins", name, ("rl", "--credit", "mine:make"), pieces, {"mine.py": head + body}, early)


def _credit(name: str, assign: str, *pieces: str) -> Case:
    body = f"def make():\n    def assign(rollouts, rewards, state):\n        {assign}\n"
    body += "    return Credit(dict, assign, frozenset(), keeps_return=True, causal=False)\n"
    return _plugin(name, body, *pieces)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
GOOD = "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(30))

CASES = (
    # data
    _prompts("no JSON", "film\n", "p.jsonl, line 1, column 1", "valid JSON"),
    _prompts("JSON cut off", '{"prompt": "a"}\n{"prompt": "b', "line 2, column 12", "Unterminated string"),
    _prompts("a list for an object", '{"prompt": "a"}\n["b"]\n', "line 2: list ['b']", "a JSON object"),
    _prompts("a key twice", '{"prompt": "a", "prompt": "b"}\n', "line 1: the key 'prompt' twice"),
    _prompts("NaN in JSON", '{"prompt": "a", "x": NaN}\n', "the number NaN, which is not finite"),
    _prompts(
        "a number of 5000 digits", '{"prompt": "a", "x": ' + "1" * 5000 + "}\n", "Exceeds the limit (4300 digits)"
    ),
    _prompts("nested too deeply", "[" * 100_000, "line 1: nested too deeply", "a flat JSON object"),
    _prompts("not UTF-8", b'{"prompt": "caf\xe9"}\n', "line 1: byte 0xe9 at offset 15", "iconv"),
    _prompts("a lone surrogate", '{"prompt": "\\ud83d"}\n', "prompt has a lone surrogate at character 0"),
    _prompts("another column", '{"promt": "a"}\n', "columns promt", "Did you mean 'promt'? Rename it"),
    _prompts("a blank prompt", '{"prompt": "a"}\n{"prompt": " "}\n', "line 2: prompt = ' '", "Fill it in"),
    _prompts("a message without role", '{"messages": [{"content": "a"}]}\n', "messages[0]: columns content", "'role'"),
    _prompts("an empty file", "", "p.jsonl: no rows"),
    _prompts("a JSON list cut off", '[{"prompt": "a"},', "line 1, column 18", file="p.json"),
    _prompts("a damaged gzip file", b"\x1f\x8b\x08\x00", "p.jsonl: after line 0", "a complete gzip file"),
    _prompts("compressed otherwise", b"BZh9", "compressed with bzip2", "or one in gzip", "Decompress"),
    _prompts("another extension", "a", "p.txt", "ends in .csv, .jsonl", file="p.txt"),
    _prompts("Parquet that is text", "prompt\na\n", "a complete Parquet file", file="p.parquet"),
    Case("data", "no such file", ("rl", "--prompts", "no/such.csv"), ("There is no folder 'no'; check the path.",)),
    Case("data", "a device", ("rl", "--prompts", "/dev/null"), ("prompts: got '/dev/null'", "ends in .csv")),
    Case("data", "a name too long", ("rl", "--prompts", "x" * 5000), ("File name too long", "a path of this system")),
    Case(
        "data",
        "an empty folder",
        ("rl", "--prompts", "d"),
        ("'d with nothing'", "Give the folder that contains the files"),
        {"d/": ""},
    ),
    _reviews("a ragged row", GOOD + "a,b,1\n", "line 32: 3 cells", "2 cells, as in the header", "Quote cells"),
    _reviews("an open quotation", GOOD + '"never closed,1\na,0\n', "lines 32-33", "Close the quotation"),
    _reviews("a stray quotation", 'text,label\n"a" b,1\n', "line 2", "double the quotation marks"),
    _reviews("a column twice", "text,text,label\na,b,1\n", "line 1: columns text, text, label", "drop one 'text'"),
    _reviews("UTF-16", (GOOD).encode("utf-16"), "line 1: byte 0xff at offset 0", "text in UTF-8"),
    _reviews("a NUL", GOOD + "nu\0l,1\n", "line 32: a NUL at offset", "Remove it"),
    _reviews("a header alone", "text,label\n", "a.csv: no rows"),
    _reviews("a strange label", GOOD + "a,perhaps\n", "line 32: label = 'perhaps'", "Write 1 or positive"),
    _reviews("labels of another scale", GOOD + "a,5\n", "line 32: label = '5'", "in another scale, such as 1 to 5"),
    _reviews("pairs of one text", "chosen,rejected\nc,c\n", "a.csv: 1 pairs, all of two equal texts"),
    _reviews("another column of texts", "review,label\na,1\n", "Did you mean 'review'? Pass --text_column review"),
    _reviews("one label only", "text,label\n" + "".join(f"t{i},1\n" for i in range(40)), "all with label 1"),
    Case(
        "data",
        "mostly bad rows, skipped",
        ("reward", "--model", "{world}/policy", "--data", "a.csv", "--output", "run", "--skip_bad_rows"),
        ("data: got 'a.csv: 2 of 3 rows cannot be used'", "at least half", "The first of them: data: got"),
        {"a.csv": "text,label\na\nb\nc,1\n"},
    ),
    # YAML
    _yaml("tabs", "optim:\n\tlr: 1\n", "--config: got 'c.yaml'", "valid YAML", "cannot start any token"),
    _yaml("a billion laughs", LAUGHS, "--config: got 'c.yaml'", "values, ", "at most 100000 and 50"),
    _yaml("an alias inside itself", "credit: &a [*a]\n", "an alias inside its own anchor"),
    _yaml("no such anchor", "credit: *a\n", "found undefined alias"),
    _yaml("a Python object", "steps: !!python/object/apply:os.system [touch x]\n", "could not determine a constructor"),
    _yaml("a Python name", "steps: !!python/name:os.system\n", "could not determine a constructor"),
    _yaml("a key twice", "steps: 3\noptim: {lr: 1}\nsteps: 4\n", "the key 'steps' is repeated", "in line 3"),
    _yaml("a key twice, inside", "optim:\n  lr: 1\n  lr: 2\n", "the key 'lr' is repeated"),
    _yaml("nested too deeply", "credit: " + "[" * 5000 + "\n", "nested more than 50 deep"),
    _yaml("nested deeply", "credit: " + "[" * 60 + "]" * 60 + "\n", "61 deep; at most"),
    _yaml("too long", "# " + "x" * 1_000_000, "1000002 characters, at most 1000000"),
    _yaml("two documents", "steps: 3\n---\nsteps: 4\n", "expected a single document"),
    _yaml("an impossible date", "steps: 2001-13-45\n", "a value that cannot be read: month must be in 1..12"),
    _yaml("an impossible bool", "steps: !!bool perhaps\n", "a value that cannot be read"),
    _yaml("a NUL", "steps: 3\0\n", "special characters are not allowed"),
    _yaml("not UTF-8", b"policy: caf\xe9\n", "valid YAML in UTF-8", "0xe9"),
    _yaml("a wrong type", "steps: [1]\n", "c.yaml: steps: got [1]", "whole number >= 1"),
    _yaml("a mapping for a number", "optim: {lr: {a: 1}}\n", "c.yaml: optim.lr: got {'a': 1}", "a number > 0"),
    _yaml("a misspelt key", "stepz: 3\n", "c.yaml: key: got 'stepz'", "Did you mean 'steps'"),
    _yaml("code of a model's", "trust_remote_code: true\n", "code inside a model's folder is never run"),
    _yaml(
        "a class to be made",
        "credit: {class_path: os.system, init_args: {command: x}}\n",
        "credit: got {'class_path'",
        "a name, {name: {key: value}}",
    ),
    _flags("a class to be made", "rl|--credit|{class_path: os.system, init_args: {command: x}}", "credit: got {'class"),
    _yaml("a list", "- steps\n", "a mapping of settings"),
    Case(
        "yaml",
        "a path with a NUL",
        ("reward", "--config", "c.yaml"),
        ("data: got", "null byte", "a path of this system"),
        {"c.yaml": 'data: "a\\0b.csv"\n'},
    ),
    Case("yaml", "a folder", ("rl", "--config", "."), ("--config: got '.'", "a YAML file")),
    # flags
    _flags("unknown", "rl|--stepz|3", "flag: got '--stepz'", "Did you mean '--steps'"),
    _flags("without a value", "rl|--steps", "--steps: got 'nothing'", "Write --steps VALUE"),
    _flags("a section", "rl|--optim|3", "--optim: got", "its settings are optim.lr"),
    _flags("no flag at all", "rl|steps=3", "argument: got 'steps=3'", "--name value"),
    _flags("a fraction for a count", "rl|--steps|1.5", "steps: got 1.5", "whole number >= 1"),
    _flags("out of range", "rl|--optim.warmup|7", "optim.warmup: got 7;", "[0, 1]"),
    _flags("not finite", "rl|--optim.lr|.inf", "optim.lr: got inf", "a number > 0"),
    _flags("YAML that is none", "rl|--credit.mix|{", "--credit.mix: got '{'", "quote it"),
    _flags("an alias inside itself", "rl|--credit|&a [*a]", "an alias inside its own anchor"),
    _flags("brackets without end", "rl|--credit|" + "[" * 9000, "nested more than 50 deep"),
    _flags("a switch with a value", "rl|--fresh=yes", "--fresh: got 'yes'", "Write only --fresh"),
    _flags("code of a model's", "rl|--trust-remote-code|true", "code inside a model's folder is never run"),
    _flags("half a yes", "rl|--skip_bad_rows|perhaps", "skip_bad_rows: got 'perhaps'", "true or false"),
    _flags("no such command", "rlhf", "command: got 'rlhf'", "Did you mean 'rl'"),
    _flags("an output that is too long", "rl|--output|" + "x" * 5000, "output: got", "File name too long"),
    _flags("a model that is too long", "rl|--policy|./" + "x" * 5000, "policy: got", "File name too long"),
    _flags("a home that is nobody's", "rl|--policy|~nobody-here/x", "policy: got", "home directory"),
    # models
    _model(
        "cut-weights", "policy: got", "weights that AutoModelForCausalLM can load", "save it again if it is damaged"
    ),
    _model("cut-header", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("no-header", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("endless-header", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("garbage-weights", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("pickle-inside", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("pickle-only", "weights in safetensors", "pickled weights (.bin) are not loaded", early=True),
    _model("other-shapes", "policy: got", "other-shapes", "weights that AutoModelForCausalLM can load"),
    _model("index-outside", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("index-garbage", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("index-list", "policy: got", "weights that AutoModelForCausalLM can load"),
    _model("config-list", "policy: got", "config-list (", "save it again if it is damaged"),
    _model("config-cut", "policy: got", "is not a valid JSON file"),
    _model("config-binary", "policy: got", "is not a valid JSON file"),
    _model("no-type", "policy: got", "a config.json that transformers can read"),
    _model("size-is-text", "policy: got", "size-is-text"),
    _model("size-is-zero", "policy: got", "size-is-zero"),
    _model("size-is-negative", "lora.targets: got 'all'", "layers of this model: it has none to adapt"),
    _model("size-is-huge", "policy: got", "size-is-huge"),
    _model("heads-do-not-divide", "policy: got", "heads-do-not-divide"),
    _model("no-activation", "policy: got", "no-activation"),
    _model("image-model", "policy: got", "image-model"),
    _model("code-in-model", "policy: got", "custom code", "a config.json that transformers can read"),
    _model("no-base", "policy: got", "names no base model"),
    _model("lost-base", "policy: got", "no-such-model"),
    _model("pickled-base", "policy: got", "pickled-base (", "an adapter whose base model can be loaded"),
    _model("pickled-adapter", "weights in safetensors", early=True),
    _model("adapter-garbage", "policy: got"),
    _model("adapter-renamed", "policy: got", "differ in 8 weights", "an adapter that fits its base model"),
    _model("statistics-nan", "reward.json: got", "not finite", '{"mean": number', flag="reward_model"),
    # tokenizers
    _model("tokenizer-garbage", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-empty", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-object", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-list", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-config-garbage", "policy: got", kind="tokenizers"),
    _model("tokenizer-config-list", "policy: got", kind="tokenizers"),
    _model("tokenizer-no-model", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-other-model", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-merges", "policy: got", "a folder or hub id with a tokenizer", kind="tokenizers"),
    _model("tokenizer-large-ids", "policy", "5000", kind="tokenizers"),
    _model("template-outside", "a chat template named '../../outside'", kind="tokenizers"),
    _model("code-in-tokenizer", "policy: got", "custom code", kind="tokenizers"),
    # credits of the user's
    Case(
        "plugins",
        "no such module",
        ("rl", "--credit", "no_such:make"),
        ("credit: got 'no_such:make'", "No module named"),
    ),
    _plugin("no such name", "", "credit: got 'mine:make'", "has no attribute 'make'", early=True),
    _plugin("an error at import", "1 / 0\n", "ZeroDivisionError: division by zero", early=True),
    _plugin("an exit at import", "raise SystemExit(0)\n", "credit: got 'mine:make'", "SystemExit", early=True),
    _plugin("a syntax error", "def make(:\n", "SyntaxError", "mine.py, line 3", early=True),
    _plugin("no function", "make = 3\n", "make is a int, not a function", early=True),
    _plugin("no signature", "make = dict\n", "credit: got", early=True),
    _plugin("an error when made", "def make():\n    return {}['x']\n", "which raised KeyError: 'x'", early=True),
    _plugin("no Credit", "def make():\n    return 3\n", "which returned a int", "a Credit", early=True),
    _plugin("a setting that is required", "def make(*, size):\n    return 3\n", "a value for 'size'", early=True),
    _plugin(
        "no function inside",
        "def make():\n    return Credit(dict, None, frozenset(), True, False)\n",
        "functions init and assign",
        early=True,
    ),
    _plugin(
        "needs that are a text",
        "def make():\n    return Credit(dict, lambda *x: x, 'values', True, False)\n",
        "a frozenset of names",
        early=True,
    ),
    _plugin(
        "needs that nothing gives",
        "def make():\n    return Credit(dict, lambda *x: x, frozenset({'value'}), True, False)\n",
        "evidence: got 'value'",
        "Did you mean 'values'",
        early=True,
    ),
    _credit(
        "another shape", "return rewards[:, :-1], state", "mine:make, which returned torch.float32 (4, 3)", "(4, 4)"
    ),
    _credit("NaN", "return rewards * float('nan'), state", "credit from mine:make of rollout 0, token 0: got nan"),
    _credit(
        "another dtype", "return rewards.long(), state", "which returned torch.int64 (4, 4)", "float rewards (4, 4)"
    ),
    _credit("no tensor", "return rewards.tolist(), state", "which returned a list", "float rewards (4, 4)"),
    _credit("no pair", "return rewards", "mine:make, which returned a Tensor", "a pair: rewards (B,T)"),
    _credit("no state", "return rewards, None", "whose state is a NoneType", "a dict of tensors"),
    _credit("an error", "return 1 / 0", "mine:make: got 'ZeroDivisionError: division by zero (mine.py, line 5)'"),
)
