"""Does what trlpatch uses of vLLM exist in this one? `python -m tests.seams WHEEL_OR_FOLDER...`

Reads sources: vLLM is neither imported nor installed. Prints what does not hold; exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.seams.check import failures, imported, seams_of, variables
from tests.seams.table import BY_KEYWORD, MEMBERS
from tests.seams.tree import Tree


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.seams", description=__doc__)
    parser.add_argument("places", type=Path, nargs="+", help="wheels of vLLM, or folders with vllm/ in them")
    total = len(list(seams_of(MEMBERS))) + len(imported()) + len(variables()) + len(BY_KEYWORD)
    broken = False
    for place in parser.parse_args(arguments).places:
        tree = Tree.of(place)
        found = failures(tree)
        broken = broken or bool(found)
        print(f"vLLM {tree.version or tree.name}: {total} names, {len(found)} do not hold", flush=True)
        for line in found:
            print(f"    {line}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
