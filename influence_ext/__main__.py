"""``python -m influence_ext``."""

from influence_ext.cli import main

raise SystemExit(main())
