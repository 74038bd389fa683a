"""What all of data_mixers needs: its error, tables in CSV and YAML, lazily imported names."""
