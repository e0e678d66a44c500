from tests.helpers import apply, check_drift, check_patched

TRAINER = """\
class GRPOTrainer(Trainer):
    def __init__(self, model, reward_funcs, args=None):
        # Args
        if args is None:
            args = GRPOConfig("out")
"""


def test_the_call_stands_before_the_first_statement_and_its_comment():
    after = TRAINER.replace(
        "        # Args\n",
        "        # trlpatch: configure\n        _trlpatch.configure(self, model, args)\n        # Args\n",
    )
    check_patched("configure", "grpo", "1.16.0", TRAINER, after)


def test_the_call_stands_after_a_docstring():
    before = TRAINER.replace("        # Args\n", '        """Build it."""\n')
    after = before.replace(
        '"""Build it."""\n',
        '"""Build it."""\n        # trlpatch: configure\n        _trlpatch.configure(self, model, args)\n',
    )
    check_patched("configure", "grpo", "0.18.0", before, after)


def test_other_classes_of_the_file_are_left_alone():
    sampler = "class RepeatSampler(Sampler):\n    def __init__(self, model, args):\n        pass\n\n\n"
    assert sampler in apply("configure", "grpo", "1.16.0", sampler + TRAINER).text


def test_an_init_without_args_is_drift():
    check_drift(
        "configure",
        "grpo",
        "1.16.0",
        TRAINER.replace("args=None", "config=None"),
        "init: expected 1, found 0",
        lookalike="2: def __init__(self, model, reward_funcs, config=None):",
    )
