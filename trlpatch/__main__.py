"""`python -m trlpatch`."""

from trlpatch.cli import main

if __name__ == "__main__":
    main()
