import os

import pytest
import torch

# Of processes that tests start: beside other tests, a thread that waits would keep a core from them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Their assertions say what differed, as those of the tests do.
pytest.register_assert_rewrite("nets", "operands")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


# Small tensors: a second thread helps little, and on a busy machine every operator would wait for it.
torch.set_num_threads(1)
# Tolerances are those of float32, which cuDNN's default for convolutions is not.
torch.backends.cudnn.allow_tf32 = False
# Of two equal steps both give the same, and sums of 16-bit products are those of float32.
torch.backends.cudnn.deterministic = True
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> str:
    from fdfa_ext import build_info

    return ", ".join(f"{key}: {value}" for key, value in build_info().items())
