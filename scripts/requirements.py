"""Print the requirement lines that scripts/setup.sh hands to pip, one per line.

    requirements.py project           dependencies of pyproject.toml
    requirements.py project test      ... of its extra `test` alone
    requirements.py wheel FILE.whl    what a wheel asks for on this interpreter

Packages that setup.sh installs in steps of their own are left out of both lists.
"""

import argparse
import email.parser
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

OWN_STEP = frozenset({"torch", "deepspeed"})
CUDA_ONLY = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""On the index these exist only as CUDA builds, and installed they break `import vllm` on CPU."""


def project_requirements(pyproject: Path, extra: str | None) -> list[str]:
    """List the dependencies of a project, or of one of its extras.

    Args:
        pyproject: path of pyproject.toml.
        extra: name of an optional-dependencies group; None gives the dependencies themselves.

    Returns:
        Requirement lines; an extra that names the project's other extras is expanded.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    if extra is not None and extra not in extras:
        raise SystemExit(f"{pyproject}: no extra '{extra}'; there are: {', '.join(extras)}")
    lines = []
    for line in project["dependencies"] if extra is None else extras[extra]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            for other in sorted(requirement.extras):
                lines += project_requirements(pyproject, other)
        elif requirement.name not in OWN_STEP:
            lines.append(line)
    return lines


def wheel_requirements(wheel: Path) -> list[str]:
    """List what a wheel needs on this interpreter, without torch and the CUDA-only packages."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    lines = []
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.name in OWN_STEP | CUDA_ONLY:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            lines.append(str(requirement))
    return lines


def main() -> None:
    """Read the command line and write the lines to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", choices=["project", "wheel"])
    parser.add_argument("what", nargs="?", help="an extra, or the path of a wheel")
    args = parser.parse_args()
    if args.source == "wheel":
        lines = wheel_requirements(Path(args.what))
    else:
        root = Path(__file__).resolve().parent.parent
        lines = project_requirements(root / "pyproject.toml", args.what)
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
