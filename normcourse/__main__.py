import sys

from normcourse.cli import main

sys.exit(main())
