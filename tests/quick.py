"""The tests that `make quick` runs: every folder of the sources is touched, in two minutes at most.

An entry is a file, or a file and the functions of it that are quick. `tests/test_quick.py` holds
the list to the tree: each entry exists, and each folder of the sources has one here.
"""

from __future__ import annotations

QUICK: dict[str, tuple[str, ...]] = {
    "tests/docs/test_blocks.py": ("test_every_block_says_what_it_is", "test_files_exist"),
    "tests/examples/test_examples.py": ("test_an_example_is_short_and_says_how_to_run_it",),
    "tests/engines/cpu/test_threads.py": (),
    "tests/engines/npu/test_traffic.py": (),
    "tests/engines/test_contract.py": (),
    "tests/launch/ascend/test_script.py": (
        "test_bad_variables_are_explained",
        "test_help_needs_nothing_and_starts_nothing",
    ),
    "tests/launch/bench/test_curve.py": ("test_the_grid_goes_from_end_to_end",),
    "tests/launch/bench/test_job.py": (
        "test_a_ratio_is_judged",
        "test_memory_over_budget_is_missed",
        "test_a_wrong_peer_is_named",
    ),
    "tests/launch/bench/test_pages.py": (),
    "tests/launch/doctor/test_environment.py": (),
    "tests/launch/doctor/test_judging.py": (),
    "tests/launch/doctor/test_scrub.py": (),
    "tests/launch/doctor/test_software.py": (),
    "tests/launch/doctor/test_variables.py": (),
    "tests/launch/doctor/tune/test_command.py": (
        "test_bad_options",
        "test_the_bytes_of_the_kernels_are_those_of_the_table",
        "test_the_fastest_of_ours_is_exported",
    ),
    "tests/launch/measuring/test_in_step.py": (),
    "tests/launch/measuring/test_limits.py": (),
    "tests/launch/measuring/test_memory.py": (),
    "tests/launch/measuring/test_rounds.py": (),
    "tests/launch/megatron_gpt/test_job.py": (
        "test_what_nothing_could_predict_is_masked",
        "test_without_megatron_it_says_what_to_install",
    ),
    "tests/launch/plan/test_job.py": (
        "test_bytes_and_time_by_hand",
        "test_collectives_by_hand",
        "test_a_prediction_as_a_user_asks_for_it",
        "test_80_columns_show_everything",
    ),
    "tests/launch/test_terminal.py": (),
    "tests/launch/train/test_job.py": (
        "test_another_run_is_not_continued",
        "test_each_step_reads_the_next_windows",
    ),
    "tests/launch/train/test_selfcheck.py": (),
    "tests/linear/test_ways.py": (
        "test_products_of_a_step",
        "test_blocks_of_columns",
        "test_a_second_backward_is_refused_by_name",
    ),
    "tests/parallel/megatron/test_loss_func.py": (),
    "tests/parallel/test_layers.py": (),
    "tests/test_agreement.py": (),
    "tests/test_dtensor.py": ("test_in_place", "test_refusals"),
    "tests/test_header.py": (),
    "tests/test_import_rules.py": (),
    "tests/test_inplace.py": (),
    "tests/test_integers.py": (),
    "tests/test_interface.py": (),
    "tests/test_module_options.py": (),
    "tests/test_normalizer.py": (),
    "tests/test_overwriting.py": (),
    "tests/test_overwritten_logits.py": (),
    "tests/test_preflight.py": (),
    "tests/test_properties.py": (),
    "tests/test_quick.py": (),
    "tests/test_results.py": (),
    "tests/test_shard.py": (),
    "tests/test_statistics.py": (),
    "tests/testing/test_batches.py": (),
    "tests/testing/test_expectation.py": (),
    "tests/testing/test_reference.py": (),
    "tests/testing/test_shardings.py": (),
}


def is_quick(nodeid: str) -> bool:
    """Whether the test of that id, ``file::function[case]``, is in the list."""
    file, _, name = nodeid.partition("::")
    functions = QUICK.get(file)
    return functions is not None and (not functions or name.partition("[")[0] in functions)
