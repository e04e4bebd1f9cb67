"""Collected by ``make oracles`` alone; prints and keeps who agrees with what."""

import json
import math
from collections import defaultdict
from pathlib import Path

from tests.oracles.pairs import version_of

KEPT = Path(__file__).parent / "agreement.json"
RESULTS = []


def pytest_ignore_collect(collection_path, config):
    """`make test` has none of the other projects."""
    return None if config.inipath and config.inipath.parent == Path(__file__).parent else True


def pytest_terminal_summary(terminalreporter, exitstatus):
    """The table; agreement.json is written where everything ran and nothing failed."""
    if not RESULTS:
        return
    agreeing = defaultdict(lambda: defaultdict(list))
    for result in RESULTS:
        if not result["deviates"]:
            agreeing[result["loss"]][result["oracle"]].append(result["difference"])
    rows = []
    for loss, oracles in sorted(agreeing.items()):
        names = ", ".join(f"{name} {version_of(name)}" for name in sorted(oracles))
        cases = [off for found in oracles.values() for off in found]
        rows.append((loss, str(len(cases)), f"{max(cases):.0e}", names))
    terminalreporter.section("losses and the code that agrees with them")
    for loss, cases, worst, names in [("loss", "cases", "largest difference", "agreeing"), *rows]:
        terminalreporter.write_line(f"{loss:<24} {cases:>5}  {worst:<18}  {names}")
    deviations = sorted({(r["oracle"], r["loss"], r["deviates"]) for r in RESULTS if r["deviates"]})
    terminalreporter.section("code that differs, as it did before")
    for oracle, loss, reason in deviations:
        terminalreporter.write_line(f"{oracle:<24} {loss:<24} {reason}")
    stats = terminalreporter.stats
    if exitstatus or stats.get("skipped") or stats.get("deselected"):
        terminalreporter.write_line(f"{KEPT.name} stays as it is: something failed or was left out")
        return
    KEPT.write_text(json.dumps(kept(agreeing, deviations), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def above(difference):
    """The next power of ten, 1e-12 at least, so that another machine's rounding does not show."""
    return 10.0 ** max(-12, math.ceil(math.log10(max(difference, 1e-300))))


def kept(agreeing, deviations):
    """What agreement.json holds."""
    return {
        "versions": {name: version_of(name) for name in sorted({r["oracle"] for r in RESULTS})},
        "losses": {
            loss: [
                {
                    "oracle": f"{name} {version_of(name)}",
                    "cases": len(found),
                    "relative_difference_below": above(max(found)),
                    "agrees": True,
                }
                for name, found in sorted(oracles.items())
            ]
            for loss, oracles in agreeing.items()
        },
        "deviations": [
            {"oracle": f"{oracle} {version_of(oracle)}", "loss": loss, "reason": reason}
            for oracle, loss, reason in deviations
        ],
    }
