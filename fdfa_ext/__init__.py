"""Forward Direct Feedback Alignment for PyTorch: training without backpropagation."""

from fdfa_ext import _fakes, _flops, methods, metrics  # noqa: F401  (both register what torch asks)
from fdfa_ext._ops import build_info
from fdfa_ext.feedback import FeedbackUpdate
from fdfa_ext.graphed import make_graphed_step
from fdfa_ext.jvp import register_jvp
from fdfa_ext.layers import FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.methods import register_method
from fdfa_ext.model import FDFA, check
from fdfa_ext.pipeline import Pipeline

__all__ = [
    "FDFA",
    "FDFABlock",
    "FDFAConv2d",
    "FDFALinear",
    "FeedbackUpdate",
    "Pipeline",
    "build_info",
    "check",
    "make_graphed_step",
    "methods",
    "metrics",
    "register_jvp",
    "register_method",
]
