"""Group norms of an OpenVINO model whose sums stay exact: added up row by row, not from end to end of a group.

The CPU plugin adds up all values of a group in a few running sums in float32. At 512×512 these are a million, and where
a picture is flat each addition is rounded the same way: the latents that a VAE with random weights made of a drawing
were off by 5e-3 beside its edges. Summed in rows they are off by 3e-5, in the same time. Small maps take longer by it:
with the step's norms in rows too, a batch of images of `shapes` took 11 % longer. And they are for float32 alone: in
bf16, whose rounding is coarser than what they mend, the VAE's decoder of `shapes` took 20 % longer and was less exact.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

_FLAT = 2  # dimensions of [N, C], which has no rows


def sum_in_rows(model: "ov.Model") -> int:
    """Let every group norm add up each row of an image on its own, then the rows' sums. Returns how many there are.

    As exporters write one up to opset 20, it is x [N, C, …, W] → [N, groups, values], normalised along its values; the
    plugin sums [N · groups, rows, W] in rows. What the model computes is the same but for its rounding, of any size.
    """
    found = [node for node in model.get_ordered_ops() if _is_group_norm(node)]
    for node in found:
        _normalise_in_rows(node)
    model.validate_nodes_and_infer_types()
    return len(found)


def _is_group_norm(node: "ov.Node") -> bool:
    """Whether it normalises the values of each of a fixed number of groups, as a Reshape of an image gives them."""
    if node.get_type_name() != "MVN" or not node.get_attributes()["normalize_variance"]:
        return False
    grouped, axes = node.input_value(0).get_node(), node.input_value(1).get_node()
    if grouped.get_type_name() != "Reshape" or axes.get_type_name() != "Constant" or list(axes.data) != [2]:
        return False
    pattern, image = grouped.input_value(1).get_node(), grouped.input_value(0).get_partial_shape()
    if pattern.get_type_name() != "Constant" or image.rank.is_dynamic or image.rank.get_length() <= _FLAT:
        return False
    match pattern.data.tolist():
        case [0, groups, -1]:
            return bool(groups > 0)
    return False


def _normalise_in_rows(node: "ov.Node") -> None:
    from openvino import opset13

    grouped = node.input_value(0)
    image, groups = grouped.get_node().input_value(0), grouped.get_node().input_value(1).get_node().data[1]
    sizes = opset13.shape_of(image)
    images = opset13.gather(sizes, _integers([0]), _integers(0))
    width = opset13.gather(sizes, _integers([-1]), _integers(0))
    shape = opset13.concat([opset13.multiply(images, _integers([groups])), _integers([-1]), width], 0)
    rows = opset13.reshape(image, shape, False)
    epsilon = node.get_attributes()["eps"]
    normalised = opset13.mvn(rows, _integers([1, 2]), True, epsilon, node.get_attributes()["eps_mode"].lower())
    replacement = opset13.reshape(normalised, opset13.shape_of(grouped), False)
    replacement.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(replacement.output(0))


def _integers(values: object) -> "ov.Node":
    from openvino import opset13

    return opset13.constant(np.array(values, np.int64))
