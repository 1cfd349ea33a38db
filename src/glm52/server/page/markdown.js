// A small part of Markdown as DOM nodes. Text of the model becomes text nodes and nothing else: there is no way from here
// to markup, and links go to http, https and mailto only.

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(.+?)\*\*|__(.+?)__|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]*)\]\(([^\s)]+)\)/;
const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DEEPEST = 12;

export function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

export function render(text, depth = 0) {
  const lines = text.split("\n"), out = document.createDocumentFragment();
  if (depth > DEEPEST) out.append(text);
  while (depth <= DEEPEST && lines.length) {
    const block = takeBlock(lines, depth + 1);
    if (block) out.append(block);
  }
  return out;
}

function takeBlock(lines, depth) {
  const line = lines[0], fence = line.match(FENCE), heading = line.match(/^(#{1,6})\s+(.*)$/);
  if (!line.trim()) return void lines.shift();
  if (fence) return takeCode(lines, fence);
  if (heading) return lines.shift(), make(heading[1].length < 3 ? "h2" : "h3", {}, inline(heading[2]));
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) return lines.shift(), make("hr");
  if (/^\s*>/.test(line)) {
    const inner = takeWhile(lines, l => /^\s*>/.test(l)).map(l => l.replace(/^\s*> ?/, ""));
    return make("blockquote", {}, render(inner.join("\n"), depth));
  }
  if (ITEM.test(line)) return takeList(lines, depth);
  if (/\|/.test(line) && /^\s*\|?[\s:-]*-[\s|:-]*$/.test(lines[1] ?? "") && /\|/.test(lines[1])) return takeTable(lines);
  const words = [lines.shift(), ...takeWhile(lines, l => l.trim() && !FENCE.test(l) && !ITEM.test(l) && !/^(#{1,6}\s|\s*>)/.test(l))];
  return make("p", {}, ...words.flatMap((l, i) => (i ? [make("br"), inline(l)] : [inline(l)])));
}

function takeWhile(lines, fits) {
  const taken = [];
  while (lines.length && fits(lines[0])) taken.push(lines.shift());
  return taken;
}

function takeCode(lines, fence) {
  lines.shift();
  const code = takeWhile(lines, l => !(l.trim().startsWith(fence[1]) && !l.trim().replaceAll(fence[1][0], "")));
  lines.shift();
  return make("pre", { tabIndex: 0, title: fence[2] }, make("code", {}, code.join("\n")));
}

function takeList(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM), list = make(/\d/.test(mark) ? "ol" : "ul");
  if (list.start !== undefined) list.start = parseInt(mark);
  while (lines.length) {
    const item = lines[0].match(ITEM);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== /\d/.test(mark)) break;
    lines.shift();
    const rest = takeWhile(lines, l => l.trim() && l.match(/^\s*/)[0].length > indent.length);
    list.append(make("li", {}, inline(item[3]), render(rest.map(l => l.slice(indent.length + 2)).join("\n"), depth)));
  }
  return list;
}

function takeTable(lines) {
  const cells = l => l.trim().replace(/^\||\|$/g, "").split("|").map(c => inline(c.trim()));
  const row = (l, tag) => make("tr", {}, ...cells(l).map(c => make(tag, {}, c)));
  const head = row(lines.shift(), "th");
  lines.shift();
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...takeWhile(lines, l => l.includes("|")).map(l => row(l, "td"))));
}

function inline(text) {
  const out = document.createDocumentFragment();
  for (let found; (found = text.match(INLINE)); text = text.slice(found.index + found[0].length)) {
    const [whole, , code, bold, strong, slanted, label, target] = found;
    out.append(text.slice(0, found.index));
    if (code !== undefined) out.append(make("code", {}, code));
    else if (bold ?? strong) out.append(make("strong", {}, inline(bold ?? strong)));
    else if (slanted) out.append(make("em", {}, inline(slanted)));
    else out.append(/^(https?:\/\/|mailto:)/i.test(target)
      ? make("a", { href: target, rel: "noopener noreferrer", target: "_blank" }, label || target) : whole);
  }
  out.append(text);
  return out;
}
