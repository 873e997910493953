"""`python -m minipaged` is the command `minipaged`."""

from minipaged.cli import main

if __name__ == "__main__":
    main()
