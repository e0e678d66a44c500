"""Mutate TRL the way it drifts, and say what trlpatch makes of each: `python -m tests.mutation`.

Exit status 1 if a mutant is applied and wrong without an error (silent), or a harmless one is refused (false alarm).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.mutation import campaign, hosts, mutants
from tests.mutation.mutants import Mutant


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--release", action="append", choices=hosts.RELEASES, help="only this one; may be repeated")
    parser.add_argument("--category", default="", help=f"letters out of {''.join(mutants.CATEGORIES)}")
    parser.add_argument("--kind", action="append", default=[], help="only this kind; may be repeated")
    parser.add_argument("--sample", type=int, default=0, help="about so many, each former survivor kind among them")
    parser.add_argument("--all", action="store_true", help="every mutant; without it, each kind once per release")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every verdict with its reasons here, a line each")
    parser.add_argument("--list", action="store_true", help="print the kinds and stop")
    parser.add_argument("--show", type=int, default=20, help="how many faults to print with their change")
    options = parser.parse_args(arguments)
    if options.list:
        for kind in mutants.every_kind().values():
            print(f"{kind.category} {kind.name}: {kind.imitates}")
        return 0
    sites = mutants.sites(options.release or hosts.RELEASES, options.category, options.kind)
    if options.sample:
        chosen: Iterable[Mutant] = mutants.sample(sites, options.sample, options.seed)
    else:
        chosen = mutants.generate(sites) if options.all else mutants.thinned(sites, options.seed)
    judged = list(campaign.saved(campaign.run(chosen, options.processes), options.json))
    faults = [one for one in judged if one.verdict in campaign.FAULTS]
    for one in faults[: options.show]:
        print(campaign.explained(one))
    print(campaign.table(judged))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
