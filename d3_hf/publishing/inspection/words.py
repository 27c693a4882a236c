"""What text and page say in the same words."""

import json
from typing import Any

from ...errors import join_names

UNKNOWN = "not available"


def quoted(name: str) -> str:
    """A name that a checkpoint or a data set brings, so that nothing in it can steer a terminal."""
    return json.dumps(name)


def rate(found: dict[str, Any], key: str) -> str:
    """``91.2 % [90.4, 92.0] of 500`` of a proportion as `Proportion.as_dict` writes it."""
    low, high = found[f"{key}_ci95"]
    return f"{100 * found[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {found[f'{key}_n']}"


def file_lines(files: dict[str, Any]) -> list[str]:
    """What is said of the files, see `inspection.files.file_facts`."""
    if not files["copies"]:
        return ["no files: the model was in memory"]
    shown = [join_names([quoted(name) for name in copy], 3) for copy in files["copies"]]
    agree = "" if len(shown) == 1 else ", compared by the loader and the same"
    lines = [f"weights: {'; '.join(shown)}{agree}"]
    if files["others"] is None:
        lines.append(f"weights for other programs: {UNKNOWN}, the Hub does not list its files")
    elif files["others"]:
        lines.append(f"weights for other programs, not compared: {join_names([quoted(name) for name in files['others']])}")
    lines += [f"SHA-256 of {quoted(name)}: {digest}" for name, digest in files["sha256"].items()]
    lines += [f"picklescan on {quoted(name)}: {_scan(scan)}" for name, scan in files["pickles"].items()]
    if hub := files.get("hub"):
        said = {name.replace("_", " "): json.dumps(value) for name, value in hub.items() if value != UNKNOWN}
        lines += [f"the Hub's {name}: {value}" for name, value in said.items()] or [
            f"the Hub's scan: {UNKNOWN}, it was not asked"
        ]
    return lines


def _scan(scan: dict[str, Any] | str) -> str:
    if isinstance(scan, str):
        return scan
    names = join_names([quoted(name) for name in scan["globals"]])
    if scan["issues"]:
        return f"DANGEROUS: {scan['issues']} of its imports can run code ({names}); do not unpickle it"
    if scan["suspicious"]:
        return f"{scan['suspicious']} of its imports are unknown, none is known to be dangerous ({names})"
    return "nothing dangerous"


def fit_lines(model: dict[str, Any], fit: dict[str, Any]) -> list[str]:
    """What is said of model and images, see `inspection.describe.describe` and `inspection.fit.fit_facts`."""
    names, per_class = fit["classes"], fit["per_class"]
    smallest, largest = (" x ".join(map(str, size)) for size in fit["sizes"])
    native = smallest if smallest == largest else f"{smallest} to {largest}"
    lines = [
        f"classes: {len(names)}, {join_names([quoted(name) for name in names])}; they are the model's {fit['mapping']}",
        f"size: {' x '.join(map(str, model['image_size']))} pixels for the model, images are {native}",
        f"normalisation: mean {_numbers(model['image_mean'])}, std {_numbers(model['image_std'])}",
        f"images per class: {per_class['fewest']} to {per_class['most']}, {fit['images']} in all",
    ]
    if per_class["none"]:
        lines.append(f"no images of {join_names([quoted(name) for name in per_class['none']])}")
    lines.append(f"copies: {fit['copies']} images are exact copies of others")
    lines.append(f"label the model contradicts, over 90 % sure: {rate(fit, 'contradicted')}")
    lines.append(f"ACC: {rate(fit, 'accuracy')}")
    return lines


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def cost_line(cost: dict[str, Any]) -> str:
    """What one defence would cost, see `inspection.cost.Cost`."""
    if cost["why_not"]:
        return f"{cost['defence']}: not timed, {cost['why_not']}"
    peak = UNKNOWN if cost["peak_memory_mib"] is None else f"{cost['peak_memory_mib']:.0f} MiB"
    return (
        f"{cost['defence']}: {cost['seconds_per_update']:.3g} s an update, {cost['updates']} updates on {cost['images']} "
        f"images, about {cost['minutes']:.2g} minutes, memory in use at the peak {peak}"
    )


def signal_line(name: str, found: dict[str, Any]) -> str:
    """What one signal says, see `inspection.suspicion.Suspicion.as_dict`."""
    if "not_applicable" in found:
        return f"{name}: not applicable: {found['not_applicable']}"
    own = f"of the model's own classes {quoted(found['suspect_class'])} is the most suspicious"
    own = f"{own}, statistic {found['statistic']:.3g}; {own_classes_words(found)}"
    if found["z"] is None:
        return f"{name}: {own}"
    leading = f"{quoted(found['class_beside_twins'])} stands out of the twins most, z = {max(found['z']):.3g}"
    return f"{name}: {leading}, p = {found['p']:.3g} by itself; {own}"


def together_lines(suspicion: dict[str, Any]) -> list[str]:
    """Which class stands out by all signals together, see `inspection.suspicion.Suspicion.class_beside_twins`; a line."""
    if suspicion["class_beside_twins"] is None:
        return []
    leading = f"{quoted(suspicion['class_beside_twins'])} stands out of the twins most"
    return [f"all signals together: {leading}, p = {suspicion['p']:.3g}"]


def measured_lines(model: dict[str, Any], suspicion: dict[str, Any]) -> list[str]:
    """How often this test was right about models of this kind, see `inspection.measured`: a line where there is a p."""
    if suspicion["p"] is None:
        return []
    found, kind = suspicion["measured"], f"{model['architecture']}, {len(model['classes'])} classes"
    if found is None:
        return [f"hit and false-alarm rates of exactly this test have not been measured on models of this kind ({kind})"]
    return [
        f"measured hit and false-alarm rates of exactly this test on models of this kind ({kind}), with {found['twins']} twins "
        f"and {found['images']} images: an alarm on {rate(found, 'hit_rate')} models with a backdoor, and on "
        f"{rate(found, 'false_alarm_rate')} without one"
    ]


def own_classes_words(found: dict[str, Any]) -> str:
    """What one signal says of the suspicious class against the model's others, see `assurance.calibration.own_classes_p`."""
    if found["p_own_classes"] is None:
        return f"{len(found['scores'])} classes are too few to compare with each other, only with twins"
    return f"against its own other classes p = {found['p_own_classes']:.2g}, as if their scores were normal: no alarm follows"


def highest(found: dict[str, Any], names: list[str], most: int = 3) -> str:
    """The classes of the highest scores."""
    order = sorted(range(len(names)), key=lambda k: -found["scores"][k])[:most]
    return ", ".join(f"{quoted(names[k])} {found['scores'][k]:.3g}" for k in order)


def change_line(name: str, found: dict[str, Any]) -> str:
    """What one signal says of two models, see `inspection.audit.Audit.as_dict`."""
    before, after = found["before"], found["after"]
    for when, one in (("the suspicious model", before), ("the purified model", after)):
        if "not_applicable" in one:
            return f"{name}: not applicable to {when}: {one['not_applicable']}"
    now = f"it still does ({after['statistic']:.3g})"
    if not found["stands_out_still"]:
        other = f"{quoted(after['suspect_class'])} does ({after['statistic']:.3g})"
        now = f"it no longer does ({found['suspect_after']:.3g}), {other}"
    return f"{name}: {quoted(before['suspect_class'])} stood out most, statistic {before['statistic']:.3g}; {now}"


def accuracy_lines(found: dict[str, Any]) -> list[str]:
    """ACC of two models on the same images, and their paired table."""
    low, high = found["accuracy_drop_ci95"]
    return [
        f"ACC before: {rate(found, 'accuracy_before')}",
        f"ACC after: {rate(found, 'accuracy_after')}",
        f"ACC drop: {100 * found['accuracy_drop']:.1f} points [{100 * low:.1f}, {100 * high:.1f}], McNemar's exact p = "
        f"{found['accuracy_drop_p']:.3g}",
        f"both right {found['both_right']}, lost {found['lost']}, gained {found['gained']}, both wrong {found['both_wrong']}",
    ]


def flip_lines(found: dict[str, Any]) -> list[str]:
    """Images on which both models are sure, and disagree."""
    lines = [
        f"both over 90 % sure, of different classes: {rate(found, 'flips')}; right before {found['right_before']}, right after "
        f"{found['right_after']}"
    ]
    return lines + [f"{quoted(pair['before'])} -> {quoted(pair['after'])}: {pair['images']}" for pair in found["pairs"]]


def relearning_lines(found: dict[str, Any]) -> list[str]:
    """How soon each model learned a canary, see `inspection.relearning.relearning_of`."""
    steps = ", ".join(map(str, found["steps"]))
    lines = [
        f"a canary for {quoted(found['canary'])} on {found['poisoned']} of {found['images']} images, ASR after {steps} steps:"
    ]
    for name, one in found["models"].items():
        rates = ", ".join(f"{100 * rate:.1f} %" for rate in one["asr"])
        half = "not half of the way" if one["half_life"] is None else f"half of the way after {one['half_life']:.3g} steps"
        lines.append(f"{name}: {rates}; mean {100 * one['area']:.1f} %, {half}")
    return lines


def recall_line(row: dict[str, Any]) -> str:
    """What became of one class."""
    if not row["images"]:
        return f"{quoted(row['class'])}: no images"
    return f"{quoted(row['class'])}: {100 * row['before']:.1f} % -> {100 * row['after']:.1f} % of {row['images']}"
