import sys

from normcourse.engine.cli import main

sys.exit(main())
