"""Pictures of triggers among what signals found."""

from collections.abc import Mapping

import numpy as np

from ..assurance.finding import Finding


def triggers_in(findings: Mapping[str, Finding | str]) -> dict[str, dict[str, np.ndarray]]:
    """The details of findings that are pictures, by signal and by their names.

    A detail is one if its shape is (3, H, W); of one picture for each class, (C, 3, H, W), that of the class that stands out.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for signal, finding in findings.items():
        details = finding.details if isinstance(finding, Finding) else {}
        for name, values in details.items():
            if values.ndim == 4 and len(values) == len(finding.scores):
                values = values[finding.suspect_class]
            if values.ndim == 3 and len(values) == 3:
                found.setdefault(signal, {})[name] = values
    return found
