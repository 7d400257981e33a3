"""A result as JUnit's XML: a test case for each check."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from parity.adapters.check import Result

_REFUSED = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # by XML 1.0


def to_junit(result: Result) -> bytes:
    """Findings are failures; what could not be told is skipped, with the reason."""
    failed = sum(bool(outcome.findings) for outcome in result.outcomes)
    skipped = sum(bool(o.unchecked and not o.findings) for o in result.outcomes)
    counts = {"tests": len(result.outcomes), "failures": failed, "errors": 0, "skipped": skipped}
    suites = ET.Element("testsuites")
    suite = ET.SubElement(suites, "testsuite", name="parity adapter check")
    for name, count in counts.items():
        suite.set(name, str(count))
    for outcome in result.outcomes:
        case = ET.SubElement(suite, "testcase", classname=_text(result.folder), name=outcome.check)
        if outcome.findings:
            lines = [f"{finding.where}: {finding.text}" for finding in outcome.findings]
            failure = ET.SubElement(case, "failure", message=_text(lines[0]))
            failure.text = _text("\n".join(lines))
        elif outcome.unchecked:
            ET.SubElement(case, "skipped", message=_text(outcome.unchecked))
        if outcome.note:
            ET.SubElement(case, "system-out").text = _text(outcome.note)
    ET.indent(suites)
    return ET.tostring(suites, "unicode", xml_declaration=True).encode()


def _text(text: str) -> str:
    return _REFUSED.sub("\ufffd", text)
