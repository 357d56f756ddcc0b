// Names in texts, as compromise (npm, MIT) finds them: reads a JSON list of texts from standard input, and writes
// for each the list of [start, end] of its proper names, in characters.
const nlp = require("compromise");

const texts = JSON.parse(require("fs").readFileSync(0, "utf-8"));
const names = texts.map((text) => {
  // JavaScript counts a character beyond the first 65,536 as two.
  const characters = (units) => Array.from(text.slice(0, units)).length;
  return nlp(text)
    .match("#ProperNoun+")
    .json({ offset: true })
    .map(({ offset: { start, length } }) => {
      const end = start + text.slice(start, start + length).replace(/[\s\p{P}]+$/u, "").length;
      return [characters(start), characters(end)];
    });
});
process.stdout.write(JSON.stringify(names));
