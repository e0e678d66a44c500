from tests.helpers import check_drift, check_patched

BEFORE = """\
import torch
from requests.adapters import HTTPAdapter

if is_requests_available():
    import requests
"""


def test_the_import_becomes_what_the_hook_finds():
    after = BEFORE.replace(
        "from requests.adapters import HTTPAdapter",
        "# trlpatch: without_requests\nHTTPAdapter = _trlpatch.http_adapter()",
    )
    check_patched("without_requests", "vllm_client", "1.9.2", BEFORE, after)


def test_an_import_of_another_class_is_drift():
    text = BEFORE.replace("HTTPAdapter", "BaseAdapter")
    reason = "adapter_import: expected 1, found 0"
    check_drift(
        "without_requests", "vllm_client", "1.9.2", text, reason, "2: from requests.adapters import BaseAdapter"
    )
