"""python -m vocab_parallel_ce.launch.plan"""

import typer

from vocab_parallel_ce.launch.plan.command import main

if __name__ == "__main__":
    typer.run(main)
