"""3×3 convolutions in fewer multiplications: Winograd's minimal filtering, made of OpenVINO's own operations.

A convolution of 3×3 takes 9 multiplications for each value of each filter and channel. F(4×4, 3×3) takes 36 for a tile
of 4×4 values, a quarter: what the tile reads, 6×6, is transformed by B, the filter by G, both are multiplied at each
of 36 places, over all channels at once, and transformed back by A: y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A.
See Lavin and Gray 2016, arXiv:1509.09308. It is meant for float32, whose error it doubles; a value that is not finite
spreads in its image further than in a convolution.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import openvino as ov

KERNEL, TILE = 3, 4  # sides of a filter, and of what one tile gives
PATCH = TILE + KERNEL - 1  # sides of what a tile reads, and of what it is transformed to
PLACES = PATCH * PATCH
# With infinity; less than half the error of the usual 0, ±1, ±2. Their form: Alam et al. 2022, arXiv:2201.10369.
_POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)

# A large image is transformed in blocks, which should stay in the cache until they are multiplied.
_BLOCK_WIDTH = 64
_BLOCK_BYTES = 20 * 2**20
# Filters are transformed in groups, of which memory holds one at a time.
_GROUP_BYTES = 60 * 2**20

# What transforming takes of the memory's time, a value in or out and a weight, in the time of a multiplication.
# Measured on layers of SD1.5 (320 channels at 64×64, 640 at 32×32, 1,280 at 16×16, 128 to 512 in the VAE) with two
# threads of an EPYC with AVX2. With more of them, or wider ones, the memory is taken to be no faster.
_VALUE_COST, _WEIGHT_COST, _MEASURED_LANES = 420, 1600, 8 * 2
_LEAST_GAIN = 1.3

Matrix = npt.NDArray[np.float64]


@cache
def transforms() -> tuple[Matrix, Matrix, Matrix]:
    """Bᵀ [6, 6], G [6, 3] and Aᵀ [4, 6], by Toom and Cook: polynomials are multiplied by their values at points."""
    points = np.array(_POINTS)
    of_data, of_filters, of_products = np.zeros((PATCH, PATCH)), np.zeros((PATCH, KERNEL)), np.zeros((TILE, PATCH))
    for index, point in enumerate(points):
        rest = np.delete(points, index)
        of_data[index, :-1] = np.poly(rest)[::-1]
        of_filters[index] = point ** np.arange(KERNEL) / np.prod(point - rest)
        of_products[:, index] = point ** np.arange(TILE)
    of_data[-1] = np.poly(points)[::-1]  # at infinity
    of_filters[-1, -1] = of_products[-1, -1] = 1
    sizes = np.linalg.norm(of_filters, axis=1) / np.linalg.norm(of_data, axis=1)
    scales = 2.0 ** np.round(np.log2(sizes) / 2)  # rows of like size in both; powers of two round nothing
    return of_data * scales[:, None], of_filters / scales[:, None], of_products


def gain(images: int, channels: int, filters: int, height: int, width: int, *, lanes: int, threads: int) -> float:
    """How many times faster than the convolution itself it should be.

    lanes: how many float32 numbers one instruction of a thread multiplies.
    """
    pixels = images * height * width
    direct = KERNEL * KERNEL * channels * filters * pixels
    moved = _VALUE_COST * (channels + filters) * pixels + _WEIGHT_COST * channels * filters
    return direct / (direct * PLACES / (TILE * TILE * KERNEL * KERNEL) + moved * lanes * threads / _MEASURED_LANES)


def filter_minimally(model: "ov.Model", *, lanes: int, threads: int) -> tuple["ov.Node", ...]:
    """Replace those convolutions of a model with static shapes that become faster by it. Returns their weights.

    They have to be kept as long as what is compiled from the model, which may still read their memory. Filters are
    transformed anew in each run: kept so, they would take four times their memory.
    """
    eligible = [node for node in model.get_ordered_ops() if _is_eligible(node)]
    chosen = [node for node in eligible if gain(*_sizes(node), lanes=lanes, threads=threads) >= _LEAST_GAIN]
    if not chosen:
        return ()
    weights = tuple(node.input_value(1).get_node() for node in chosen)
    for node in chosen:
        replacement = _filtered(node)
        replacement.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(replacement.output(0))
    model.validate_nodes_and_infer_types()
    return weights


def _is_eligible(node: "ov.Node") -> bool:
    """Whether it is a 3×3 convolution at stride 1 that keeps the image's size, of whole tiles, in float32."""
    if node.get_type_name() != "Convolution":
        return False
    data, weights, attributes = node.input_value(0), node.input_value(1), node.get_attributes()
    return (
        data.get_partial_shape().is_static
        and weights.get_node().get_type_name() == "Constant"
        and weights.get_element_type().get_type_name() == "f32"
        and list(weights.get_shape())[2:] == [KERNEL, KERNEL]
        and list(attributes["strides"]) == list(attributes["dilations"]) == [1, 1]
        and list(attributes["pads_begin"]) == list(attributes["pads_end"]) == [1, 1]
        and all(side % TILE == 0 for side in list(data.get_shape())[2:])
    )


def _sizes(node: "ov.Node") -> tuple[int, int, int, int, int]:
    """Images, channels, filters, height and width."""
    images, channels, height, width = node.input_value(0).get_shape()
    return images, channels, node.output(0).get_shape()[1], height, width


def _filtered(node: "ov.Node") -> "ov.Node":
    """What the node gives, [N, K, H, W], put together from blocks of groups of filters."""
    images, channels, filters, height, width = _sizes(node)
    data = _reshaped(node.input_value(0), [images * channels, height, width])
    spans_down, spans_across = _spans(height, _block_height(images * channels, width)), _spans(width, _BLOCK_WIDTH)
    patches = {}
    for down in spans_down:
        row = _cut(data, down, height, axis=1)
        for across in spans_across:
            block = _cut(row, across, width, axis=2)
            patches[down, across] = _transformed_data(block, _spread(down, height), _spread(across, width), images)
    groups: list[ov.Node] = []
    for group in _spans(filters, max(_GROUP_BYTES // (4 * PLACES * channels), 1)):
        # Each waits for the one before it, so that the filters of one at a time are held transformed.
        transformed = _transformed_filters(node.input_value(1), group, groups[-1] if groups else data)
        rows = []
        for down in spans_down:
            sizes = (images, len(group), len(down))
            blocks = [
                _values(_product(transformed, patches[down, across]), [*sizes, len(across)]) for across in spans_across
            ]
            rows.append(_joined(blocks, axis=3))
        groups.append(_joined(rows, axis=2))
    return _joined(groups, axis=1)


def _transformed_filters(value: Any, group: range, after: "ov.Node") -> "ov.Node":  # noqa: ANN401
    """w [K, C, 3, 3] → G w Gᵀ [36, len(group), C], in each run anew, after another node."""
    from openvino import opset13 as opset

    filters, channels = list(value.get_shape())[:2]
    own = value if len(group) == filters else _shared(value.get_node().data[group.start : group.stop])
    _, of_filters, _ = transforms()
    transform = opset.multiply(_constant(_both_ways(of_filters)), _one(after))
    flat = _reshaped(own, [len(group) * channels, KERNEL * KERNEL])
    return _reshaped(opset.matmul(transform, flat, False, True), [PLACES, len(group), channels])


def _transformed_data(block: "ov.Node", down: Matrix, across: Matrix, images: int) -> "ov.Node":
    """x [N·C, rows, columns] → Bᵀ x B [36, C, tiles], by the matrices of `_spread`."""
    from openvino import opset13 as opset

    planes, rows, columns = block.output(0).get_shape()
    lines = opset.matmul(_reshaped(block, [planes * rows, columns]), _constant(across), False, True)
    patches = _product(_constant(down[None]), _reshaped(lines, [planes, rows, len(across)]))
    tiles_down, tiles_across = len(down) // PATCH, len(across) // PATCH
    channels = planes // images
    patches = _reshaped(patches, [images, channels, PATCH, tiles_down, PATCH, tiles_across])
    patches = opset.transpose(patches, _integers([2, 4, 1, 0, 3, 5]))
    return _reshaped(patches, [PLACES, channels, images * tiles_down * tiles_across])


def _values(products: "ov.Node", sizes: Sequence[int]) -> "ov.Node":
    """m [36, K, tiles] → Aᵀ m A [N, K, rows, columns]."""
    from openvino import opset13 as opset

    images, filters, height, width = sizes
    _, _, of_products = transforms()
    tiles = _product(_constant(_both_ways(of_products)), _reshaped(products, [PLACES, -1]))
    tiles = _reshaped(tiles, [TILE, TILE, filters, images, height // TILE, width // TILE])
    return _reshaped(opset.transpose(tiles, _integers([3, 2, 4, 0, 5, 1])), sizes)


def _both_ways(transform: Matrix) -> Matrix:
    """A transform of one dimension, applied to both of an image: [m, n] → [m·m, n·n]."""
    return np.asarray(np.kron(transform, transform), np.float64)


def _spread(span: range, size: int) -> Matrix:
    """Bᵀ of every tile in a span of one dimension, as one matrix [6 · tiles, len(span) and its neighbours].

    First each tile's first value, then each one's second. What lies beyond the image, of this size, is zero.
    """
    of_data, _, _ = transforms()
    around, tiles = _around(span, size), len(span) // TILE
    spread = np.zeros((PATCH, tiles, len(around)))
    for tile in range(tiles):
        for place in range(PATCH):
            at = span.start + tile * TILE + place - 1
            if at in around:
                spread[:, tile, at - around.start] = of_data[:, place]
    return spread.reshape(PATCH * tiles, len(around))


def _around(span: range, size: int) -> range:
    """The span with the neighbours that its outermost values read, inside the image."""
    return range(max(span.start - 1, 0), min(span.stop + 1, size))


def _spans(size: int, most: int) -> list[range]:
    return [range(first, min(first + most, size)) for first in range(0, size, most)]


def _block_height(planes: int, width: int) -> int:
    """Rows of a block of all planes, of whole tiles, by what it takes transformed."""
    line = 4 * PLACES * planes * min(width, _BLOCK_WIDTH) // TILE
    return max(_BLOCK_BYTES // line, 1) * TILE


def _cut(value: "ov.Node", span: range, size: int, *, axis: int) -> "ov.Node":
    """What a span reads along a dimension of this size."""
    from openvino import opset13 as opset

    around = _around(span, size)
    if len(around) == size:
        return value
    return opset.slice(value, *(_integers([number]) for number in (around.start, around.stop, 1, axis)))


def _one(value: "ov.Node") -> "ov.Node":
    """The number 1, taken from a value: OpenVINO would transform, and keep, what depends on no input."""
    from openvino import opset13 as opset

    first = opset.slice(_reshaped(value, [-1]), _integers([0]), _integers([1]), _integers([1]))
    return opset.clamp(first, 1.0, 1.0)


def _joined(parts: Sequence["ov.Node"], *, axis: int) -> "ov.Node":
    from openvino import opset13 as opset

    return parts[0] if len(parts) == 1 else opset.concat(list(parts), axis)


def _product(left: "ov.Node", right: "ov.Node") -> "ov.Node":
    from openvino import opset13 as opset

    return opset.matmul(left, right, False, False)


def _reshaped(value: Any, shape: Sequence[int]) -> "ov.Node":  # noqa: ANN401
    from openvino import opset13 as opset

    return opset.reshape(value, _integers(shape), False)


def _constant(matrix: Matrix) -> "ov.Node":
    from openvino import opset13 as opset

    return opset.constant(matrix.astype(np.float32))


def _integers(values: Sequence[int]) -> "ov.Node":
    from openvino import opset13 as opset

    return opset.constant(np.array(values, np.int64))


def _shared(array: npt.NDArray[np.float32]) -> "ov.Node":
    """A constant that reads the array's memory, as OpenVINO allows for an array that must not be written to."""
    import openvino

    return openvino.op.Constant(openvino.Tensor(array, openvino.Shape(array.shape), openvino.Type.f32))
