"""python -m vocab_parallel_ce.launch.doctor"""

from vocab_parallel_ce.launch.doctor.command import app

if __name__ == "__main__":
    app()
