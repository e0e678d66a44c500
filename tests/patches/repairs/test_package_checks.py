from tests.helpers import check_drift, check_patched

IMPORT = "from transformers.utils.import_utils import _is_package_available\n"
REST = '\n_vllm_available, _vllm_version = _is_package_available("vllm", return_version=True)\n'


def test_the_imported_function_is_the_hook():
    after = "# trlpatch: package_checks\n_is_package_available = _trlpatch.is_package_available\n"
    check_patched("package_checks", "import_utils", "0.28.0", IMPORT + REST, after + REST)


def test_an_import_of_more_than_that_is_drift():
    text = IMPORT.replace("import _is", "import is_torch_available, _is") + REST
    check_drift(
        "package_checks",
        "import_utils",
        "0.28.0",
        text,
        "package_check_import: expected 1, found 0",
        "1: from transformers.utils.import_utils import is_torch_available, _is_package_available",
    )
