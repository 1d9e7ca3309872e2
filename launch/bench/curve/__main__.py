"""python -m vocab_parallel_ce.launch.bench.curve"""

from vocab_parallel_ce.launch.jobs import run

if __name__ == "__main__":
    run("curve")
