"""What becomes of rows: CSV files, tables, the generated parts of documents, pictures."""
