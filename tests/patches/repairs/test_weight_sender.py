from tests.helpers import check_drift, check_patched

IMPORT = (
    "from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine"
)

BEFORE = f"""\
import torch

if is_vllm_available():
    {IMPORT}
    from vllm.utils.network_utils import get_ip
"""


def test_the_import_becomes_what_the_hook_finds():
    after = BEFORE.replace(
        f"    {IMPORT}",
        "    # trlpatch: weight_sender\n"
        "    NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine = _trlpatch.weight_sender()",
    )
    check_patched("weight_sender", "vllm_client", "1.12.0", BEFORE, after)


def test_an_import_of_other_names_is_drift():
    text = BEFORE.replace("Args, NCCLWeightTransferEngine", "Args")
    line = "4: " + IMPORT.replace("Args, NCCLWeightTransferEngine", "Args")
    check_drift("weight_sender", "vllm_client", "1.12.0", text, "sender_import: expected 1, found 0", line)
