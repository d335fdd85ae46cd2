"""One operation between steps, for every operation, its kinds, and every optimizer.

These are no random examples but the smallest ones: a list of what fails by itself.
"""

from itertools import product

from ..support.forked import Failed, Forked
from ..support.surgery.operations import Surgery

STEP = {"without": (), "fresh": True, "size": 1.0}
# A parameter without a penalty, a matrix, a bias; and for two at once another matrix.
ON, OTHER = ("emb.weight", "lin.weight", "lin.bias"), "conv.weight"
KINDS = {
    "freeze": {"trainable": [False]},
    "move_dtype": {"dtype": ["float64", "bfloat16"], "replace": [False, True]},
    "resize": {"rows": [0, 2, 80], "cols": [3, 20], "state": ["keep", "drop"],
               "grad": ["keep", "drop"]},
    "place": {"how": ["inside", "columns", "gaps", "mixed", "expanded", "negative"]},
    "replace_parameter": {"in_optimizer": [False, True]},
    "replace_module": {"in_optimizer": [False, True]},
    "swap_tensors": {"other": [None, OTHER, "norm.bias"]},
    "share_memory": {"other": [OTHER, "norm.bias", "frozen.weight"], "shift": [0, 2, None]},
    "free_storage": {"offset": [0, 5], "keep": [False, True]},
    "edit": {"tracked": [False, True]},
    "give_gradient": {"how": ["plain", "contiguous", "columns", "gaps", "mixed", "expanded",
                              "negative", "dtype", "weight", "freed", "shared"]},
    "zero_grad": {"set_to_none": [False, True]},
    "clear_state": {"how": ["clear", "new", "pop", "empty"]},
    "replace_moment": {"which": [0, 1], "how": [
        "zeros", "copy", "dtype", "rows", "fewer", "strides", "expanded", "negative", "gone",
        "weight", "moment", "freed"]},
    "change_step": {"how": ["gone", "zero", "late"]},
    "change_options": {"group": [0], "lr": [0.1], "strength": [0.0, {"lin.*": 0.0, "*": 0.3}],
                       "as_tensor": [False, True]},
    "change_momentum": {"group": [0], "momentum": [0.0, 0.5]},
    "change_groups": {"other": [OTHER], "how": [
        "exchange", "reverse", "reorder", "replace", "merge", "add", "remove"]},
    "save": {}, "load": {"which": ["own", "torch", "moment", "vectors"]},
    "look": {"what": ["state_dict", "sigma", "report", "metrics", "repr", "vectors", "penalty"]},
    "penalize": {"between": [None, "smaller", "freed", "dtype"]},
}  # fmt: skip
NAMELESS = {"zero_grad", "change_options", "change_momentum", "save", "load", "look"}
SETTINGS = [{"groups": 2, "backend": "cpu", "sizes": (5, 7, 6, 3)},
            {"groups": 1, "backend": "reference", "sizes": (5, 7, 6, 3)}]  # fmt: skip


def calls(operations):
    """Yield (operation, arguments) of every kind of these operations."""
    for operation in operations:
        kinds = KINDS[operation]
        for name in [None] if operation in NAMELESS else ON:
            for values in product(*kinds.values()):
                arguments = dict(zip(kinds, values, strict=True))
                yield operation, arguments if name is None else {"name": name, **arguments}


def run(way: str, setting: dict, operation: str, arguments: dict, at: int) -> str | None:
    """Take steps with one operation after ``at`` of them; return what is wrong, or None."""
    process = Forked(Surgery)
    try:
        process.call("build", way=way, **setting)
        for i in range(4):
            if i == at:
                if operation == "load":
                    process.call("save")
                process.call(operation, **arguments)
            process.call("step", **STEP)
    except Failed as error:
        return str(error)
    finally:
        process.close()
    return None


def report(ways, operations, backends) -> bool:
    """Run all, print what fails, and return whether nothing does."""
    total = failed = 0
    for operation, arguments in calls(operations):
        for setting, way, at in product(SETTINGS, ways, (0, 2)):
            if setting["backend"] not in backends:
                continue
            total += 1
            if (problem := run(way, setting, operation, arguments, at)) is not None:
                failed += 1
                shown = ", ".join(f"{n}={x!r}" for n, x in arguments.items())
                print(f"FAILED {operation}({shown}) after {at} steps; {way}, {setting['backend']}: "
                      f"{problem}\n", flush=True)  # fmt: skip
    print(f"one operation between steps: {total} cases, {failed} failed")
    return failed == 0
