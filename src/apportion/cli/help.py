"""The `--help` text of a stage: every setting with its description, the values it accepts and its default."""

from __future__ import annotations

from argparse import ArgumentParser, HelpFormatter

from apportion.config import Section
from apportion.config.section import rule_of, section_of
from apportion.system import safe_yaml


class _Formatter(HelpFormatter):
    """The standard layout, with room for dotted names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def format_help(kind: type[Section], command: str) -> str:
    """Return the help of `apportion COMMAND`, whose settings are `kind`: a group of flags a section."""
    parser = ArgumentParser(
        prog=f"apportion {command}",
        usage=f"apportion {command} [--config FILE.yaml] [--name value ...]",
        description=_summary(kind),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML file of settings; flags win over it")
    parser.add_argument("--fresh", action="store_true", help="start over in the output folder")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    _add_section(parser, kind(), "settings", "")
    return parser.format_help()


def _add_section(parser: ArgumentParser, defaults: Section, title: str, prefix: str) -> None:
    """Add a group with the settings of `defaults`, then one for each section in it."""
    group = parser.add_argument_group(title, _summary(type(defaults)) if prefix else None)
    fields = type(defaults).model_fields
    for name, field in fields.items():
        if section_of(field) is None:
            default = safe_yaml.dump(getattr(defaults, name)).removesuffix("...\n").strip()
            text = f"{field.description} ({rule_of(field).expected}; default: {_inline(default)})"
            group.add_argument(f"--{prefix}{name}", metavar=name.upper(), help=text.replace("%", "%%"))
    for name, field in fields.items():
        if section_of(field) is not None:
            _add_section(parser, getattr(defaults, name), name, f"{prefix}{name}.")


def _summary(kind: type[Section]) -> str:
    """Return the first paragraph of a section's docstring."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _inline(default: str) -> str:
    """Return the YAML of a value on one line: a list in brackets."""
    lines = default.splitlines()
    return f"[{', '.join(line.removeprefix('- ') for line in lines)}]" if default.startswith("- ") else default
