"""All checks together, as the command line and tests take them."""

from __future__ import annotations

from typing import Any, NamedTuple

from trlpatch.doctor.checks import Result, machine_checks
from trlpatch.doctor.machine import Machine, look_at_machine
from trlpatch.doctor.package_checks import package_checks


class Diagnosis(NamedTuple):
    """What the checks found, in their order; `healthy` unless one of them failed."""

    results: tuple[Result, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that keeps rollouts on vLLM from working."""
        return not any(result.level == "fail" for result in self.results)

    @property
    def summary(self) -> str:
        """One line: what stands in the way, or that nothing does."""
        failed = [result.check for result in self.results if result.level == "fail"]
        warned = [result.check for result in self.results if result.level == "warn"]
        limits = f", with limits ({', '.join(dict.fromkeys(warned))})" if warned else ""
        if failed:
            return f"rollouts on vLLM cannot work here: {', '.join(dict.fromkeys(failed))}"
        return f"rollouts on vLLM can work here{limits}"

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON-able values."""
        return {"healthy": self.healthy, "summary": self.summary, "results": [one.to_dict() for one in self.results]}


def diagnose(machine: Machine | None = None) -> Diagnosis:
    """Run every check on this machine, or on facts about another one; installed packages are this environment's."""
    machine = look_at_machine() if machine is None else machine
    return Diagnosis((*machine_checks(machine), *package_checks(machine)))
