"""python -m vocab_parallel_ce.launch.bench.call_cost"""

from vocab_parallel_ce.launch.jobs import run

if __name__ == "__main__":
    run("call-cost")
