"""The main job: train a net on a real data set by FDFA or by one of the paper's other methods."""

from fdfa_ext.arguments import UserError
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.models import build_net
from fdfa_ext.train.training import Config, EpochResult, Run

__all__ = ["Config", "Dataset", "EpochResult", "Run", "UserError", "build_net", "load_dataset"]
