"""Bindings to fixed buffers, driven with ONNX Runtime's CPU: it binds as a GPU does, and ignores graph ids."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sdrt.runners.bound_session import BoundSession, DeviceMemory

NAMES = ("total", "rows")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """total = a + b, in the shape of a; rows = the sum of each row, of a shape that no input has."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["a", "b"], ["total"]),
            helper.make_node("ReduceSum", ["total", "axis"], ["rows"], keepdims=0),
        ],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("a", "b")],
        [
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["n", "m"]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n"]),
        ],
        [onnx.numpy_helper.from_array(np.array([1]), "axis")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


class Recorder:
    """A session that remembers which graph each run named, which addresses it read and wrote, and what was released."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.graphs, self.addresses, self.fixed, self.released, self.fails = [], [], [], [], False

    def io_binding(self):
        return self.session.io_binding()

    def run_with_iobinding(self, iobinding, run_options=None):
        if self.fails:
            raise RuntimeError("the device is lost")
        self.graphs.append(None if run_options is None else int(run_options.get_run_config_entry("gpu_graph_id")))
        self.fixed.append(None not in iobinding._bound_outputs.values())
        self.session.run_with_iobinding(iobinding, run_options)
        bound = [*iobinding._bound_inputs.values(), *iobinding.get_outputs()]
        self.addresses.append([value.data_ptr() for value in bound])

    def release_captured_graph(self, graph_annotation_id=0):
        self.released.append(graph_annotation_id)


def options_of(graph):
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def memory(graphs=True):
    return DeviceMemory(
        device="cpu",
        make_value=onnxruntime.OrtValue.ortvalue_from_shape_and_type,
        make_run_options=options_of if graphs else None,
    )


@pytest.fixture
def recorder(model):
    return Recorder(model)


@pytest.fixture
def bound(recorder):
    return BoundSession(recorder, memory(), most_shapes=2)


def feeds(rows=2, value=1.0):
    return {"a": np.full((rows, 3), value, np.float32), "b": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)}


def check(outputs, fed):
    total, rows = outputs
    np.testing.assert_array_equal(total, fed["a"] + fed["b"])
    np.testing.assert_array_equal(rows, (fed["a"] + fed["b"]).sum(1))


def test_the_first_run_and_those_after_it_give_what_the_session_gives(bound):
    for value in (1.0, 2.0, -3.0, 1.0):
        check(bound.run(NAMES, feeds(value=value)), feeds(value=value))


def test_outputs_come_in_the_order_asked_for(bound):
    rows, total = bound.run(("rows", "total"), feeds())
    check((total, rows), feeds())
    rows, total = bound.run(("rows", "total"), feeds(value=5.0))
    check((total, rows), feeds(value=5.0))


def test_from_the_second_run_on_every_address_is_fixed(bound, recorder):
    for value in range(4):
        bound.run(NAMES, feeds(value=value))
    assert recorder.addresses[1] == recorder.addresses[2] == recorder.addresses[3]
    assert recorder.fixed == [False, True, True, True]


def test_nothing_is_captured_before_the_addresses_are_fixed(bound, recorder):
    for _ in range(3):
        bound.run(NAMES, feeds())
    assert recorder.graphs == [-1, 1, 1]


def test_each_set_of_shapes_has_its_buffers_and_its_graph(bound, recorder):
    for rows in (2, 3, 2, 3):
        check(bound.run(NAMES, feeds(rows)), feeds(rows))
    assert recorder.graphs == [-1, -1, 1, 2]
    assert set(recorder.addresses[2]).isdisjoint(recorder.addresses[3])


def test_the_shapes_used_least_recently_make_room_and_their_graph_is_released(bound, recorder):
    for rows in (2, 3, 2, 4):
        bound.run(NAMES, feeds(rows))
    assert recorder.released == [2]
    check(bound.run(NAMES, feeds(2, 7.0)), feeds(2, 7.0))
    assert recorder.graphs[-1] == 1


def test_shapes_that_come_back_are_bound_anew_under_another_id(bound, recorder):
    for rows in (2, 3, 4, 2, 2):
        check(bound.run(NAMES, feeds(rows)), feeds(rows))
    assert recorder.released == [1, 2]
    assert recorder.graphs == [-1, -1, -1, -1, 4]


def test_without_graphs_runs_name_none_and_none_is_released(recorder):
    bound = BoundSession(recorder, memory(graphs=False), most_shapes=1)
    for rows in (2, 2, 3):
        check(bound.run(NAMES, feeds(rows)), feeds(rows))
    assert recorder.graphs == [None, None, None]
    assert recorder.released == []


def test_results_belong_to_the_caller(bound):
    bound.run(NAMES, feeds())
    total, _ = bound.run(NAMES, feeds(value=1.0))
    kept = total.copy()
    bound.run(NAMES, feeds(value=9.0))
    np.testing.assert_array_equal(total, kept)
    total[:] = 0
    check(bound.run(NAMES, feeds(value=1.0)), feeds(value=1.0))


def test_feeds_may_be_read_only_and_are_not_kept(bound):
    fed = feeds()
    for array in fed.values():
        array.flags.writeable = False
    bound.run(NAMES, fed)
    check(bound.run(NAMES, fed), fed)


def test_after_a_failed_run_its_buffers_and_its_graph_are_not_used_again(bound, recorder):
    bound.run(NAMES, feeds())
    bound.run(NAMES, feeds())
    recorder.fails = True
    with pytest.raises(RuntimeError, match="the device is lost"):
        bound.run(NAMES, feeds())
    recorder.fails = False
    check(bound.run(NAMES, feeds(value=4.0)), feeds(value=4.0))
    check(bound.run(NAMES, feeds(value=5.0)), feeds(value=5.0))
    assert recorder.graphs == [-1, 1, -1, 2]
