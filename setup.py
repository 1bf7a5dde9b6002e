"""Packaging: everything is read from settings.ini, which nbdev reads too."""
import configparser, shlex
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {name: shlex.split(cfg[f'{name}_requirements']) for name in ('dev', 'bench')}
extras['all'] = sorted({o for reqs in extras.values() for o in reqs})
readme = here/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        'Programming Language :: Python :: 3',
    ],
    packages=find_packages(include=['aquatic_nb', 'aquatic_nb.*']),
    package_data={'aquatic_nb': ['assets/*', 'assets/**/*']},
    include_package_data=False, # the globs above say it all
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={
        'console_scripts': shlex.split(cfg['console_scripts']),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
