"""The commands, in the order of the usage text. To add one, write a module with a `COMMAND` and name it here."""

from abft.cli.commands import (
    compare,
    doctor,
    evaluate,
    find_heads,
    merge_weights,
    plan_memory,
    published_code,
    reproduce,
    run_analyses,
    run_demo,
    run_experiment,
    train,
    write_report,
)

COMMANDS = (
    doctor.COMMAND,
    train.COMMAND,
    evaluate.COMMAND,
    run_experiment.COMMAND,
    reproduce.COMMAND,
    run_analyses.COMMAND,
    write_report.COMMAND,
    compare.COMMAND,
    find_heads.COMMAND,
    published_code.COMMAND,
    plan_memory.COMMAND,
    merge_weights.COMMAND,
    run_demo.COMMAND,
)
