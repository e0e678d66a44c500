from tests.helpers import check_drift, check_patched

BEFORE = """\
class OnlineDPOTrainer:
    def get_train_dataloader(self):
        if sampled:
            dataloader_params["drop_last"] = self.args.dataloader_drop_last
            dataloader_params["worker_init_fn"] = seed_worker
"""


def test_the_hook_gets_the_function_and_the_trainer():
    after = BEFORE.replace(
        '            dataloader_params["worker_init_fn"] = seed_worker',
        "            # trlpatch: seed_worker\n"
        '            dataloader_params["worker_init_fn"] = _trlpatch.seed_worker(self, seed_worker)',
    )
    check_patched("seed_worker", "online_dpo", "0.29.1", BEFORE, after)


def test_a_function_with_arguments_is_drift():
    text = BEFORE.replace("= seed_worker", "= partial(seed_worker, rank=0)")
    reason = "worker_init: expected 1, found 0"
    check_drift("seed_worker", "online_dpo", "0.29.1", text, reason, "5: dataloader_params")
