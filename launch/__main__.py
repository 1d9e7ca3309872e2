"""python -m vocab_parallel_ce.launch JOB: the console entry, also under torchrun -m."""

from vocab_parallel_ce.launch.jobs import main

if __name__ == "__main__":
    main()
