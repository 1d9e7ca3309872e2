"""python -m vocab_parallel_ce.launch.bench.fused_head"""

from vocab_parallel_ce.launch.jobs import run

if __name__ == "__main__":
    run("fused-head")
