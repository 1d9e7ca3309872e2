"""python -m vocab_parallel_ce.launch.bench"""

import typer

from vocab_parallel_ce.launch.bench.command import main

if __name__ == "__main__":
    typer.run(main)
