"""The page at ``/page``: people ask the served model in a browser."""
