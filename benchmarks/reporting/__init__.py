"""What becomes of measured rows: CSV files, tables, generated parts of documents, pictures.

``rows`` reads and writes CSV files, ``documents`` replaces the text between two markers.
"""
