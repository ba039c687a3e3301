"""Building a bundle: engines made or fetched, sealed with parity, and moved into place as a whole."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt._version import VERSION
from sdrt.bundle import (
    FORMAT_VERSION,
    BackendRecord,
    Bundle,
    Manifest,
    ShapeProfile,
    record_file,
    write_manifest,
)
from sdrt.cache import Store
from sdrt.engines.base import ComponentSource, EngineBuilder
from sdrt.engines.components import BuiltComponent, make_component
from sdrt.engines.evidence import Evidence, gather_evidence
from sdrt.engines.onnx_folder import FOLDER_OF, OnnxFolder, read_onnx_folder
from sdrt.engines.precision import choose_builder, choose_precision
from sdrt.engines.profile import parse_profile
from sdrt.errors import Cancelled, OutputError
from sdrt.files import check_writable, refuse_existing, staged_directory
from sdrt.plan.rows import MAX_STATE_SLOTS
from sdrt.progress import Progress
