"""`python -m cwdpo_bench`: the command line, also for `accelerate launch -m`."""

from cwdpo_bench.cli import main

if __name__ == "__main__":
    main()
