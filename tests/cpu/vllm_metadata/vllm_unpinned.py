"""Let vLLM 0.23 run on a CUDA build of torch without a driver."""


def patch() -> None:
    """Copy without pinned memory, which vLLM 0.23 asks for on every machine and later releases where there is any."""
    import torch
    from vllm.utils import torch_utils

    copy = torch_utils.async_tensor_h2d
    if copy.__defaults__ == (True,) and not torch.cuda.is_available():
        copy.__defaults__ = (False,)
