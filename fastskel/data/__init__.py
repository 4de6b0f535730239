"""Data: packed data sets, views, the loader, protocols and synthetic motion."""

from fastskel.data.batch import Batch, DrawAddress, View
from fastskel.data.check import CheckThresholds, check_dataset
from fastskel.data.convert import convert_dataset, convert_joints, correspondence
from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.findings import CheckReport, Finding
from fastskel.data.loader import Loader
from fastskel.data.normalise import prenorm
from fastskel.data.pack import pack_arrays, pack_source
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.protocols import Split, holdout, semi, split
from fastskel.data.synthetic import make_synthetic
from fastskel.data.torch_dataset import ClipDataset
from fastskel.data.transforms import (
    ClipAddress,
    ClipTransform,
    JointCorruption,
    JointMask,
    OneOf,
    Rotation,
    Scaling,
    Shear,
    SpatialTransform,
    Transform,
)
from fastskel.data.views import CenterCrop, RandomCrop, ViewSpec, eval_view, make_view, usdrl_views

__all__ = [
    "Batch",
    "BodyMask",
    "CenterCrop",
    "CheckReport",
    "CheckThresholds",
    "ClipAddress",
    "ClipDataset",
    "ClipTransform",
    "DrawAddress",
    "Finding",
    "FrameMask",
    "GaussianBlur",
    "GaussianNoise",
    "JointCorruption",
    "JointMask",
    "Loader",
    "Mirror",
    "OneOf",
    "PackedDataset",
    "RandomCrop",
    "Rotation",
    "Scaling",
    "Shear",
    "SpatialTransform",
    "Split",
    "Transform",
    "View",
    "ViewSpec",
    "check_dataset",
    "convert_dataset",
    "convert_joints",
    "correspondence",
    "eval_view",
    "holdout",
    "make_synthetic",
    "make_view",
    "open_dataset",
    "pack_arrays",
    "pack_source",
    "prenorm",
    "semi",
    "split",
    "usdrl_views",
]
