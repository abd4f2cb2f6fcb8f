"""A static package index: read wheels, render PEP 503 pages, write them in an order that never shows a broken link.

Reading and rendering are pure functions over immutable wheels; the same wheels give the same bytes.
"""
