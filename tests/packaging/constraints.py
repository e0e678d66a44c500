"""Do README's install lines resolve to what ran? `python -m tests.packaging.constraints`, run by tox -e constraints.

Asks the registry that pip and uv are configured for, and installs nothing. Exit status 1 if a line no longer resolves.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "constraints"
LINES = {"gpu.txt": ["trl", "peft"], "gpu-transformers4.txt": ["trl==0.22.2", "peft"]}
PLATFORM = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]


def pins(file: str) -> dict[str, str]:
    """Return the versions that `file` pins with `==`."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: str(one.specifier)[2:] for one in wanted if str(one.specifier).startswith("==")}


def main() -> int:
    failed = 0
    for file, packages in LINES.items():
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *PLATFORM]
        command += ["--extra", "vllm", str(ROOT / "pyproject.toml"), "-", "-c", str(FOLDER / file)]
        done = subprocess.run(command, input="\n".join(packages), capture_output=True, text=True, check=False)
        found = dict(line.split("==") for line in done.stdout.splitlines() if line.count("==") == 1)
        wrong = {name: found.get(name) for name, version in pins(file).items() if found.get(name) != version}
        failed |= bool(done.returncode or wrong)
        print(f"{file}: {len(found)} packages, {'as pinned' if not wrong else f'not as pinned: {wrong}'}{done.stderr}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
