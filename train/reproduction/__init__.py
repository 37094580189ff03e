"""The paper's claims, the runs that test them, and the report of what came out."""
